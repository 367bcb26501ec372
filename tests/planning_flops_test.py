"""The analytic count of an update's operations, against the compiler's."""

import dataclasses
import re

import jax
import pytest

from dpop_jax import config as config_lib
from dpop_jax import logprobs, optim, program, sharding
from dpop_jax.data import dataset, packing, plan
from dpop_jax.models import attention_blocks, decoder
from dpop_jax.planning import flops, hlo

BLOCK = attention_blocks.MAX_BLOCK_SIZE
MODEL = decoder.DecoderConfig(
  vocab_size=1024,
  hidden_size=512,
  intermediate_size=768,
  num_hidden_layers=1,
  num_attention_heads=8,
  num_key_value_heads=4,
)
CHUNK_SIZE = logprobs.default_chunk_size(MODEL.hidden_size)
LENGTH = 2 * CHUNK_SIZE
# So few are kept.
assert logprobs.are_logits_kept(LENGTH, MODEL.vocab_size, logprobs.KEPT_BYTES)


def compile_step(model, *, loss="dpop"):
  """An update of one row of LENGTH tokens, all of which are scored."""
  options = dict(beta=0.3, dpop_lambda=50.0) if loss == "dpop" else {}
  config = config_lib.Config(
    model=model,
    data=dataset.DataConfig(train="-", tokenizer="-"),
    batch=plan.BatchConfig(batch_size=1, row_length=LENGTH),
    loss=config_lib.LossConfig(name=loss, **options),
    optimizer=optim.OptimizerConfig(name="adamw", peak_learning_rate=1e-3),
    run=config_lib.RunConfig(num_steps=1),
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  made = program.make_program(config, mesh, num_steps=1)
  batch = packing.empty_rows((1, 1), packing.Capacity(LENGTH, LENGTH, 8, 1))
  return program.compile_step(made.train_step, made, made.abstract_state, batch)


def product_flops(step, trip_counts):
  """Of all products of matrices in a compiled program, loops run through."""
  module = hlo.parse(step.as_text())
  total = 0
  for instruction, computation, _, times in module.executed(trip_counts):
    if instruction.opcode != "dot":
      continue
    operand = module.computations[computation][instruction.operands[0]]
    sizes = [
      int(n) for n in re.search(r"\[(.*?)\]", operand.type)[1].split(",")
    ]
    axes = re.search(r"lhs_contracting_dims=\{(.*?)\}", instruction.text)[1]
    work = 2 * hlo.num_bytes(instruction.type) // 4
    for axis in axes.split(","):
      work *= sizes[int(axis)]
    total += work * times
  return total


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_count_is_that_of_all_products_in_the_program(remat):
  model = dataclasses.replace(MODEL, remat=remat, num_hidden_layers=3)
  # Of blocks of queries and keys, so many are computed.
  num_pairs = 7
  work = flops.Work(
    positions=LENGTH,
    scores=LENGTH,
    visible_pairs=num_pairs * BLOCK**2,
    are_logits_kept=True,
  )

  def trip_counts(op_name):
    return num_pairs if "attention" in op_name else LENGTH // CHUNK_SIZE

  counted = flops.count(model, model, work)
  assert product_flops(compile_step(model), trip_counts) == counted.total


def test_the_count_is_the_compilers_of_one_layer():
  # The compiler counts the body of a loop once: one layer, one chunk of the
  # scored positions, one pair of blocks.
  work = flops.Work(
    positions=LENGTH,
    scores=CHUNK_SIZE,
    visible_pairs=BLOCK**2,
    are_logits_kept=True,
  )
  counted = flops.count(MODEL, MODEL, work).total
  compiled = compile_step(MODEL).cost_analysis()["flops"]
  # It also counts what is no product: Adam's 14 operations for each of 3
  # million parameters, norms, softmax.
  assert counted < compiled < 1.05 * counted


def test_supervised_training_has_no_reference():
  work = flops.Work(
    positions=LENGTH,
    scores=LENGTH,
    visible_pairs=BLOCK**2,
    are_logits_kept=True,
  )
  counted = flops.count(MODEL, None, work)
  assert counted.reference == 0
  trip_counts = lambda op_name: 1 if "attention" in op_name else 2
  step = compile_step(MODEL, loss="sft")
  assert product_flops(step, trip_counts) == counted.total


def test_a_hand_worked_count():
  model = decoder.DecoderConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    remat="full",
  )
  work = flops.Work(positions=100, scores=50, visible_pairs=1000)
  counted = flops.count(model, model, work)
  # A layer's weights: queries and outputs 4 x 8 each, keys and values 4 x 4
  # each, three matrices of 4 x 6 in the MLP.
  weights = 2 * 32 + 2 * 16 + 3 * 24
  layers = 2 * 2 * weights * 100
  attention = 2 * 4 * 8 * 1000
  head = 2 * 10 * 4 * 50
  assert counted.forward == counted.reference == layers + attention + head
  assert counted.backward == 2 * counted.forward
  # All but the MLP's last product; attention, and half of it once more for its
  # own backward pass; the logits.
  again = 2 * 2 * (weights - 24) * 100 + attention + attention // 2 + head
  assert counted.recomputation == again


def test_a_token_is_multiplied_with_its_experts_only():
  sizes = dict(num_experts=8, num_experts_per_tok=2)
  sparse = dataclasses.replace(MODEL, **sizes)
  work = flops.Work(positions=1, scores=1, visible_pairs=1)
  more = (
    flops.count(sparse, None, work).forward
    - flops.count(MODEL, None, work).forward
  )
  # A second expert, and the router.
  assert more == 2 * (3 * 512 * 768 + 512 * 8)
