"""The configs of Hugging Face models, in and out.

transformers' config classes know the defaults and both layouts (`rope_theta`
and `rope_scaling`; `rope_parameters`). What they would let pass in silence is
refused here.
"""

import copy
import dataclasses
import os
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from dpop_jax.hf import architectures, keys, rope
from dpop_jax.models import decoder_config

FAMILIES = architectures.FAMILIES
# Fields of a DecoderConfig that are not about what model it is.
HOW_TO_RUN = ("initializer_range", "dtype", "param_dtype", "remat")


def from_hf(
  hf_config: Mapping[str, Any], *, ignored_options: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
  """Reads a config.json.

  Args:
    hf_config: Its content.
    ignored_options: Keys that are not known, and are to be ignored.

  Returns:
    A key of FAMILIES, and DecoderConfig's arguments except for those that only
    say how to run it. What follows from the rest (head_dim, layer_types) is
    None.

  Raises:
    ValueError: The model, or an option that it has, is not supported; or a
      value is none that its key can have.
  """
  family_name = name_of(hf_config)
  _check_keys(hf_config, family_name, ignored_options)
  try:
    return family_name, _fields(hf_config, family_name, ignored_options)
  except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
    # Such as a size of 0 that another one is divided by.
    raise ValueError(
      f"config.json does not describe a {FAMILIES[family_name].architecture}: "
      f"some value in it cannot be used ({type(error).__name__}: {error})."
    ) from error


def _fields(hf_config, family_name, ignored_options):
  """What `from_hf` returns beside the family; raises what values may cause."""
  completed = _completed(hf_config, family_name)
  family = FAMILIES[family_name]
  fields: dict[str, Any] = dict(family.settles)
  for name, key in family.keys.items():
    fields[name] = getattr(completed, key, None)
  fields |= _windows(completed, family)
  fields |= _rotary(completed, family_name, fields, ignored_options)
  if fields["hidden_act"] not in decoder_config.ACTIVATIONS:
    key = family.keys["hidden_act"]
    raise ValueError(
      f"config.json has {key}={fields['hidden_act']!r}; supported are "
      f"{', '.join(decoder_config.ACTIVATIONS)}."
    )
  cls = decoder_config.DecoderConfig
  return _model_fields(cls(**rope.as_floats(cls, fields)))


def to_hf(config: decoder_config.DecoderConfig) -> dict[str, Any]:
  """A config.json for a model that did not come from Hugging Face.

  It is in the older layout, which both transformers 4 and 5 read, and of the
  first family that computes what the config says. The caller may set what the
  config does not know: `max_position_embeddings`, and the tokens' ids, which
  are null.

  Raises:
    ValueError: No family computes it.
  """
  for name in FAMILIES:
    hf_config = _written(config, name)
    try:
      _, fields = from_hf(hf_config)
    except ValueError:
      continue
    if fields == _model_fields(config):
      return hf_config
  raise ValueError(
    "No model of Hugging Face computes what this model's config says; known "
    f"are {_architectures()}."
  )


def name_of(hf_config: Mapping[str, Any]) -> str:
  """A key of FAMILIES, from what a config.json says it is of.

  Raises:
    ValueError: It is of no supported family, or quantized.
  """
  quantization = hf_config.get("quantization_config")
  if quantization is not None:
    method = isinstance(quantization, dict) and quantization.get("quant_method")
    raise ValueError(
      f"config.json has a quantization_config (quant_method={method!r}); "
      "supported are float32, float16 and bfloat16 weights: dequantize the "
      "model with the tool that made it."
    )
  names = hf_config.get("architectures") or [None]
  if not isinstance(names, list):
    raise ValueError(
      f"config.json has architectures={names!r}, where a list is expected."
    )
  architecture = names[0]
  model_type = hf_config.get("model_type")
  if architecture is None and model_type is None:
    raise ValueError(
      "config.json has neither architectures nor a model_type; expected that "
      "of a Hugging Face model."
    )
  if architecture is None and model_type in FAMILIES:
    return model_type
  for name, family in FAMILIES.items():
    if family.architecture == architecture:
      if model_type not in (None, name):
        raise ValueError(
          f"config.json has the architecture {architecture}, whose model_type "
          f"is {name!r}, but model_type={model_type!r}; correct one of them."
        )
      return name
  came = architecture or f"model_type={model_type!r}"
  if "text_config" in hf_config:
    came += ", which takes more than text"
    advice = ": save its language model alone"
  elif architecture == "QWenLMHeadModel":
    advice = "; use its llamafied form, a LlamaForCausalLM"
  else:
    advice = ""
  raise ValueError(
    f"config.json describes {came}; supported are {_architectures()}{advice}."
  )


def _check_keys(hf_config, family_name, ignored_options):
  family = FAMILIES[family_name]
  heeded = sorted(_read_keys(family) & {*ignored_options})
  if heeded:
    raise ValueError(
      f"{', '.join(heeded)} of config.json cannot be ignored: the model is "
      "computed by it; take it out of --ignore_options (import_hf) or "
      "run.ignored_options."
    )
  required = {**keys.REQUIRED, **family.required}
  for key, value in hf_config.items():
    shown = reprlib.repr(value)  # Lists by layer would fill a screen.
    if key in required:
      if value not in required[key]:
        expected = " or ".join(repr(v) for v in required[key])
        raise ValueError(
          f"config.json has {key}={shown}; for {family.architecture} only "
          f"{expected} is supported."
        )
    elif key in keys.UNSUPPORTED and value is not None and value is not False:
      raise ValueError(
        f"config.json has {key}={shown}, which is not supported here: "
        f"{keys.UNSUPPORTED[key]}."
      )
    elif not (
      key in _read_keys(family)
      or key in family.unread
      or key in keys.HARMLESS
      or key in ignored_options
      or value is None
      or value is False
    ):
      raise ValueError(
        f"config.json has {key}={shown}, which is not known for "
        f"{family.architecture}; if it does not change the model, allow it "
        f"with --ignore_options={key} (import_hf) or run.ignored_options."
      )


def _read_keys(family):
  """Keys whose value goes into the model."""
  return {*family.keys.values(), *family.windows, *keys.ROPE}


def _completed(hf_config, family_name):
  """transformers' config, with its defaults, of the keys that matter."""
  # Else it says at every start that PyTorch, which nobody needs, is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers
  from huggingface_hub import errors

  family = FAMILIES[family_name]
  # Its class writes into what it is given.
  given = copy.deepcopy(
    {k: v for k, v in hf_config.items() if k in _read_keys(family)}
  )
  if family_name == "qwen3_moe" and "num_local_experts" in hf_config:
    # As transformers 5 writes it.
    given.setdefault("num_experts", hf_config["num_local_experts"])
  for parameters in _all_rope_parameters(given):
    rope_type = parameters.pop("type", None)
    rope_type = parameters.get("rope_type", rope_type)
    if rope_type == "su" and family_name == "phi3":
      rope_type = "longrope"  # Its first name.
    if rope_type is not None:
      rope.check_type(rope_type)
      parameters["rope_type"] = rope_type
  # What it would warn of is either checked here or no matter.
  logging = transformers.utils.logging
  verbosity = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    completed = transformers.AutoConfig.for_model(family_name, **given)
    # Again, with the keys that the class does not declare.
    completed.standardize_rope_params()
  except (
    errors.StrictDataclassError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
  ) as error:
    # A KeyError's text has quotes around it; the last line says most.
    reason = str(error.args[0] if error.args else error).splitlines()[-1]
    raise ValueError(
      f"config.json does not describe a {family.architecture}: "
      f"{reason.strip().rstrip('.')}."
    ) from error
  finally:
    logging.set_verbosity(verbosity)
  return completed


def _all_rope_parameters(hf_config):
  """Each dict of rotary options, nested by layer type or not."""
  for name in ("rope_scaling", "rope_parameters"):
    parameters = hf_config.get(name) or {}
    if not isinstance(parameters, dict):
      raise ValueError(
        f"config.json has {name}={parameters!r}, where an object is expected."
      )
    nested = [v for v in parameters.values() if isinstance(v, dict)]
    yield from nested or [parameters]


def _windows(completed, family):
  layers = completed.num_hidden_layers
  window = completed.sliding_window if family.windows else None
  if "layer_types" in family.windows:
    types = tuple(completed.layer_types)
  else:
    kind = decoder_config.FULL if window is None else decoder_config.SLIDING
    types = (kind,) * layers
  if decoder_config.SLIDING not in types:
    window = None
  return {"sliding_window": window, "layer_types": types}


def _rotary(completed, family_name, fields, ignored_options):
  parameters = completed.rope_parameters
  found: dict[str, Any] = {}
  if family_name == "gemma3_text":
    local = parameters[decoder_config.SLIDING]
    unknown = parameters.keys() - {decoder_config.FULL, decoder_config.SLIDING}
    if local["rope_type"] != "default" or unknown:
      raise ValueError(
        f"config.json has rope_parameters={parameters!r}; for "
        "Gemma3ForCausalLM they are given by layer type, and only full "
        "attention may have a rope type other than 'default'."
      )
    if decoder_config.SLIDING in fields["layer_types"]:
      found["rope_local_base_freq"] = local["rope_theta"]
    parameters = parameters[decoder_config.FULL]
  share = parameters.get("partial_rotary_factor")
  if family_name == "phi3":
    found["partial_rotary_factor"] = share
  elif share not in (None, 1.0):
    raise ValueError(
      f"config.json has partial_rotary_factor={share!r}; supported is 1.0, and "
      "other values for Phi3ForCausalLM alone."
    )
  return {
    **found,
    "rope_theta": parameters["rope_theta"],
    "rope_scaling": rope.from_hf(
      parameters,
      max_position_embeddings=completed.max_position_embeddings,
      ignored_options=ignored_options,
    ),
  }


def _model_fields(config):
  """All that defines the model, said in one way."""
  config = _canonical(config)
  return {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in HOW_TO_RUN
  }


def _canonical(config):
  """The same model, with None where a value follows from the others."""
  changes: dict[str, Any] = {}
  if config.head_width * config.num_attention_heads == config.hidden_size:
    changes["head_dim"] = None
  if config.query_pre_attn_scalar == config.head_width:
    changes["query_pre_attn_scalar"] = None
  if len(set(config.is_sliding)) == 1:
    changes["layer_types"] = None
  is_scaled = config.rope_scaling.rope_type != "default"
  if config.rope_local_base_freq == config.rope_theta and not is_scaled:
    changes["rope_local_base_freq"] = None
  if config.num_experts is None:
    changes["norm_topk_prob"] = True
  # How long the texts will be is not the model's matter either.
  changes["rope_scaling"] = dataclasses.replace(
    config.rope_scaling, use_long_factor=None
  )
  return dataclasses.replace(config, **changes)


def _written(config, family_name):
  """The config in a family's keys, whether it fits or not."""
  family = FAMILIES[family_name]
  written: dict[str, Any] = {
    "architectures": [family.architecture],
    "model_type": family_name,
    # Else those of another tokenizer, the family's, hold.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
  }
  for name, key in family.keys.items():
    written[key] = getattr(config, name)
  written["head_dim"] = config.head_width
  if "query_pre_attn_scalar" in written:
    # An integer there.
    scalar = config.query_pre_attn_scalar or config.head_width
    is_whole = float(scalar).is_integer()
    written["query_pre_attn_scalar"] = int(scalar) if is_whole else scalar
  if family.windows:
    written["sliding_window"] = config.sliding_window
  if "use_sliding_window" in family.windows:
    written["use_sliding_window"] = config.sliding_window is not None
  if "layer_types" in family.windows:
    written["layer_types"] = [
      decoder_config.SLIDING if is_sliding else decoder_config.FULL
      for is_sliding in config.is_sliding
    ]
  return written | _written_rotary(config, family_name)


def _written_rotary(config, family_name):
  scaling = config.rope_scaling
  written: dict[str, Any] = {
    "rope_theta": config.rope_theta,
    "rope_scaling": rope.to_hf(scaling),
  }
  original = scaling.original_max_position_embeddings
  if family_name == "gemma3_text":
    local = config.rope_local_base_freq
    written["rope_local_base_freq"] = local or config.rope_theta
  elif family_name == "phi3":
    written["partial_rotary_factor"] = config.partial_rotary_factor
    if original is not None:
      written["original_max_position_embeddings"] = original
  if original is not None and scaling.factor is not None:
    written["max_position_embeddings"] = int(original * scaling.factor)
  return written


def _architectures():
  return ", ".join(family.architecture for family in FAMILIES.values())
