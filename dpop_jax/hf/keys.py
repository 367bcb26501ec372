"""Keys of a config.json that are not a family's own."""

# What rotary positions follow from.
ROPE = (
  "max_position_embeddings",
  "original_max_position_embeddings",
  "partial_rotary_factor",
  "rope_parameters",
  "rope_scaling",
  "rope_theta",
)

# In every family: keys that may be there, and what each has to be.
REQUIRED = {"is_causal": (True,)}

# Never to be ignored, and why.
UNSUPPORTED = {
  "clip_qkv": "queries, keys and values are not clipped",
  "per_layer_config": "all layers have the same sizes",
  "use_bidirectional_attention": "attention is causal",
  "is_encoder_decoder": "a model is a decoder alone",
  "add_cross_attention": "a model is a decoder alone",
}

# They change no number that a model computes in evaluation.
HARMLESS = frozenset(
  (
    # What the file is of, and who wrote it.
    "_name_or_path",
    "architectures",
    "auto_map",
    "is_llama_config",
    "model_type",
    "name_or_path",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    # Tokens are the tokenizer's matter and those of generation_config.json.
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    # Lengths of the texts that it was trained on; nothing is computed from it.
    "max_sequence_length",
    "model_max_length",
    "seq_length",
    # Each tensor's dtype stands in its file, and ours is the user's choice.
    "dtype",
    "torch_dtype",
    # How transformers computes and what it returns.
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "cache_implementation",
    "chunk_size_feed_forward",
    "keys_to_ignore_at_inference",
    "pretraining_tp",
    "return_dict",
    "use_cache",
    # Dropout and noise of training: nothing is dropped here, since a policy
    # that drops would differ from its reference at the first step already.
    "attention_dropout",
    "embd_pdrop",
    "hidden_dropout",
    "resid_pdrop",
    "router_jitter_noise",
    # A loss of pretraining, which the losses for preferences do not have.
    "output_router_logits",
    "router_aux_loss_coef",
    # Of classifiers.
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "pruned_heads",
    "task_specific_params",
    # Of generation, from before it had a file of its own.
    "do_sample",
    "max_length",
    "max_new_tokens",
    "min_length",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
  )
)
