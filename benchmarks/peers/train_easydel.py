"""EasyDeL's DPOTrainer on the pairs of an order (see `meter`)."""

import contextlib
import importlib.metadata
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import easydel  # noqa: E402
import jax  # noqa: E402
import meter as meter_lib  # noqa: E402
import numpy as np  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from flax import nnx  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402

# Lengths are rounded up to this.
_MULTIPLE = 64
_IGNORED = -100


def main() -> None:
  meter = meter_lib.Meter()
  order, sizes = meter.order, meter.order["model"]
  prompt_length = _longest(meter, (0,))
  answer_length = _longest(meter, (1, 2))
  config = easydel.Qwen3Config(
    **sizes,
    max_position_embeddings=prompt_length + answer_length,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    use_sliding_window=False,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=0,
  )
  config.add_basic_configurations(
    sharding_axis_dims=(1, 1, 1, 1, 1),
    attn_mechanism="vanilla",
    attn_dtype=jax.numpy.float32,
    gradient_checkpointing="",
    freq_max_position_embeddings=prompt_length + answer_length,
    mask_max_position_embeddings=prompt_length + answer_length,
  )
  policy = easydel.Qwen3ForCausalLM(
    config=config,
    dtype=jax.numpy.float32,
    param_dtype=jax.numpy.float32,
    rngs=nnx.Rngs(0),
  ).shard_model()
  settings = dict(
    total_batch_size=order["microbatch_pairs"],
    gradient_accumulation_steps=order["pairs"] // order["microbatch_pairs"],
    max_prompt_length=prompt_length,
    max_completion_length=answer_length,
    max_length=prompt_length + answer_length,
    loss_type="sigmoid",
    beta=order["beta"],
    precompute_ref_log_probs=order["is_reference_cached"],
    learning_rate=order["learning_rate"],
    weight_decay=0.0,
  )
  arguments = easydel.DPOConfig(
    save_directory=order["folder"],
    num_train_epochs=1,
    max_training_steps=meter.num_updates,
    use_wandb=False,
    do_last_save=False,
    save_steps=None,
    log_steps=1,
    report_steps=1,
    shuffle_train_dataset=False,
    track_memory=False,
    resume_if_possible=False,
    use_esurge_generation=False,
    generation_interval=None,
    progress_bar_type="json",
    **settings,
  )
  # Its cache of reference log-probs needs the mesh around it.
  is_cached = order["is_reference_cached"]
  with policy.mesh if is_cached else contextlib.nullcontext():
    trainer = easydel.DPOTrainer(
      arguments=arguments,
      model=policy,
      processing_class=_tokenizer(),
      train_dataset=_dataset(meter),
    )
    _watch(trainer, meter)
    with contextlib.suppress(meter_lib.Stop):
      trainer.train()
  meter.write(
    versions={
      "easydel": importlib.metadata.version("easydel"),
      "jax": jax.__version__,
    },
    settings=settings | {"attn_mechanism": "vanilla"},
  )


def _watch(trainer, meter):
  """Tells the meter when a step has been computed."""
  execute = trainer._execute_train_step

  def run(*args, **kwargs):
    batch = kwargs["batch"] if "batch" in kwargs else args[1]
    for name in ("chosen", "rejected"):
      meter.count_answer_tokens(np.sum(batch[f"{name}_attention_mask"]))
    result = execute(*args, **kwargs)
    jax.block_until_ready(result[0].graphstate)
    meter.end_update()
    meter.add_loss(result[1].loss)
    if meter.is_done:
      raise meter_lib.Stop
    return result

  trainer._execute_train_step = run


def _longest(meter, parts):
  longest = max(len(pair[part]) for pair in meter.pairs for part in parts)
  return meter_lib.round_up(longest, _MULTIPLE)


def _dataset(meter):
  rows = []
  for prompt, *answers in meter.pairs:
    row = {
      "prompt_input_ids": prompt,
      "prompt_attention_mask": [1] * len(prompt),
    }
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
      row[f"{name}_input_ids"] = prompt + answer
      row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(answer))
      row[f"{name}_labels"] = [_IGNORED] * len(prompt) + answer
    rows.append(row)
  return Dataset.from_list(rows)


def _tokenizer():
  """One that is never asked: everything comes as ids."""
  words = {"<eos>": 0, "<pad>": 1}
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
    eos_token="<eos>",
    bos_token="<eos>",
    pad_token="<pad>",
    unk_token="<pad>",
  )


if __name__ == "__main__":
  main()
