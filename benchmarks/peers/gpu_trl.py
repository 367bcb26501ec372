"""TRL's DPOTrainer on the pairs of an order (see `meter`), on a GPU."""

import meter as meter_lib
import torch
import train_trl
import transformers
import trl
from datasets import Dataset

# The first that can be had; TRL's documentation recommends the first, which
# `kernels` brings from the hub, and the second is what transformers takes.
_ATTENTIONS = ("kernels-community/flash-attn2", "sdpa")


def main() -> None:
  meter = meter_lib.Meter()
  order = meter.order
  is_on_gpu = not order["is_smoke"]
  if is_on_gpu and not torch.cuda.is_available():
    raise SystemExit("This torch sees no GPU.")
  torch.manual_seed(0)
  policy, reasons = _policy(order, is_on_gpu)
  reference = None
  if not order["is_reference_cached"]:
    reference = type(policy)(policy.config).to(policy.device, policy.dtype)
    reference.load_state_dict(policy.state_dict())
  settings = dict(
    per_device_train_batch_size=order["peer_pairs"],
    gradient_accumulation_steps=order["pairs"] // order["peer_pairs"],
    max_length=None,
    precompute_ref_log_probs=order["is_reference_cached"],
    gradient_checkpointing=order["is_checkpointed"],
    bf16=True,
    tf32=True if is_on_gpu else None,
    use_liger_kernel=is_on_gpu,
    optim=(
      "adafactor" if order["optimizer"] == "adafactor" else "adamw_torch_fused"
    ),
    learning_rate=order["learning_rate"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    beta=order["beta"],
    loss_type=["sigmoid"],
  )
  arguments = trl.DPOConfig(
    output_dir=order["folder"],
    max_steps=meter.num_updates,
    use_cpu=not is_on_gpu,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    **settings,
  )
  wait = torch.cuda.synchronize if is_on_gpu else lambda: None
  rows = [
    dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
    for prompt, chosen, rejected in meter.pairs
  ]
  trainer = train_trl.PairTrainer(
    model=policy,
    ref_model=reference,
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=train_trl.tokenizer(),
    callbacks=[train_trl.Watch(meter, wait)],
  )
  trainer.meter = meter
  trainer.train()
  meter.write(
    versions={
      "trl": trl.__version__,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    },
    settings=settings
    | {
      "weights": order["peer_weights"],
      "attention": policy.config._attn_implementation,
      "attention that could not be had": reasons,
    },
    gpu_peak_bytes=torch.cuda.max_memory_allocated() if is_on_gpu else None,
  )


def _policy(order, is_on_gpu):
  """A model with random weights, and why its attention is not the first."""
  config_class = getattr(transformers, f"{order['architecture']}Config")
  reasons = {}
  attentions = _ATTENTIONS if is_on_gpu else _ATTENTIONS[-1:]
  for attention in attentions:
    config = config_class(
      **order["sizes"],
      max_position_embeddings=8192,
      attn_implementation=attention,
    )
    dtype = getattr(torch, order["peer_weights"])
    try:
      # Made where it is used: 8 billion numbers take minutes on a host.
      with torch.device("cuda" if is_on_gpu else "cpu"):
        policy = transformers.AutoModelForCausalLM.from_config(
          config, dtype=dtype
        )
      return policy, reasons
    # Whatever the hub's client raises where there is no network.
    except Exception as error:
      reasons[attention] = str(error).splitlines()[0]
  raise SystemExit(f"No attention can be had: {reasons}")


if __name__ == "__main__":
  main()
