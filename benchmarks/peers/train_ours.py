"""dpop_jax's own training loop on the pairs of an order (see `meter`)."""

import functools
from unittest import mock

import jax
import meter as meter_lib
import numpy as np

import dpop_jax
from dpop_jax import config as config_lib
from dpop_jax import inputs, optim, program, train
from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, plan
from dpop_jax.models import decoder


def main() -> None:
  meter = meter_lib.Meter()
  order = meter.order
  compile_step = program.compile_step

  def compiled(step, the_program, *args):
    return _watched(compile_step(step, the_program, *args), meter)

  data = dataset.Loaded(
    train=dataset.TokenPairs.of(
      pairs_lib.TokenPair(*parts) for parts in meter.pairs
    ),
    eval=None,
    report={},
  )
  # The pairs come in the order of a run's updates already.
  in_order = functools.partial(plan.Plan, is_shuffled=False)
  try:
    with (
      mock.patch.object(program, "compile_step", compiled),
      mock.patch.object(plan, "Plan", in_order),
      mock.patch.object(inputs, "load_data", lambda *_: data),
    ):
      train.train(_config(meter), order["folder"] + "/run")
  except meter_lib.Stop:
    pass
  meter.write(
    versions={"dpop_jax": dpop_jax.__version__, "jax": jax.__version__},
    settings={
      "batch.row_length": order["row_length"],
      "batch.rows_per_microbatch": 1,
      "batch.group_by_prompt": order["is_grouped"],
      "reference.cache_dir is set": order["is_reference_cached"],
    },
  )


def _watched(step, meter):
  """A compiled train step that tells the meter when it has been computed."""

  def run(state, reference, batch, *args):
    state, report = jax.block_until_ready(step(state, reference, batch, *args))
    meter.end_update()
    meter.add_loss(report.metrics["loss"].mean())
    meter.count_answer_tokens(np.asarray(batch.answer_lengths).sum())
    if meter.is_done:
      raise meter_lib.Stop
    return state, report

  return run


def _config(meter) -> config_lib.Config:
  order = meter.order
  return config_lib.Config(
    model=decoder.DecoderConfig(
      **order["model"], qk_norm="head", rms_norm_eps=1e-6
    ),
    # Not read: the pairs are ids already.
    data=dataset.DataConfig(
      train=order["pairs_file"], tokenizer=order["tokenizer"]
    ),
    batch=plan.BatchConfig(
      batch_size=order["pairs"],
      row_length=order["row_length"],
      group_by_prompt=order["is_grouped"],
    ),
    loss=config_lib.LossConfig(name="dpo", beta=order["beta"]),
    optimizer=optim.OptimizerConfig(
      name="adamw", peak_learning_rate=order["learning_rate"]
    ),
    reference=config_lib.ReferenceConfig(
      cache_dir=order["folder"] + "/reference"
      if order["is_reference_cached"]
      else None
    ),
    run=config_lib.RunConfig(num_steps=meter.num_updates, log_every_steps=1),
  )


if __name__ == "__main__":
  main()
