"""Hugging Face folders of runs and imports, and what becomes of mistakes."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_runs

from dpop_jax import (
  checkpoints,
  config_values,
  exports,
  hugging_face_files,
  imports,
  inputs,
  sharding,
  train,
)
from dpop_jax import config as config_lib
from dpop_jax.data import tokenizers
from dpop_jax.hf import safetensors_files
from dpop_jax.models import decoder

ONE = sharding.MeshConfig(data=8, fsdp=1, tensor=1)
MIXED = sharding.MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny_runs.write_model(
    tmp_path_factory.mktemp("models") / "qwen3",
    attention_bias=False,
    qk_norm="head",
    head_dim=8,
    rms_norm_eps=1e-6,
    param_dtype="bfloat16",
  )


def tensors(folder):
  """Bytes of each tensor of a folder, with dtype and shape."""
  found = {}
  for name, tensor in safetensors_files.tensors(folder).items():
    dtype = safetensors_files.DTYPES[tensor.dtype]
    size = dtype.itemsize * int(np.prod(tensor.shape))
    with open(pathlib.Path(folder, tensor.file), "rb") as file:
      file.seek(tensor.start)
      found[name] = (tensor.dtype, tensor.shape, file.read(size))
  return found


def read_json(folder, name):
  return json.loads(pathlib.Path(folder, name).read_text())


@pytest.mark.parametrize("param_dtype", [None, "float32"])
def test_import_and_export_give_the_same_bytes(source, tmp_path, param_dtype):
  imported, exported = str(tmp_path / "imported"), str(tmp_path / "exported")
  imports.import_hf(source, imported, mesh=MIXED, param_dtype=param_dtype)
  # What it came from is not needed any more.
  assert read_json(imported, "config.json")["model"]["param_dtype"] == (
    param_dtype or "bfloat16"
  )
  summary = exports.export_hf(imported, exported, mesh=ONE, max_file_bytes=2000)
  assert summary == exports.Exported("qwen3", "0", "bfloat16")
  assert tensors(exported) == tensors(source)
  assert (tmp_path / "exported" / safetensors_files.INDEX).exists()
  expected = read_json(source, "config.json") | {"torch_dtype": "bfloat16"}
  assert read_json(exported, "config.json") == expected
  old, new = tokenizers.load(source), tokenizers.load(exported)
  assert new.encode("^ab cde$") == old.encode("^ab cde$")
  leftovers = [path.name for path in tmp_path.iterdir()]
  assert sorted(leftovers) == ["exported", "imported"]


def test_tensors_keep_dtypes_that_differ(source, tmp_path):
  """Some models have float32 norms or routers among bfloat16 weights."""
  mixed = shutil.copytree(source, tmp_path / "mixed")
  found = tensors(source)
  name = "model.norm.weight"
  dtype, shape, data = found[name]
  assert dtype == "BF16"
  wide = np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float32) + 1e-6
  arrays = {
    n: np.frombuffer(b, safetensors_files.DTYPES[d]).reshape(s)
    for n, (d, s, b) in found.items()
  }
  arrays[name] = wide.reshape(shape)
  safetensors.numpy.save_file(arrays, mixed / "model.safetensors")
  imports.import_hf(
    str(mixed), str(tmp_path / "imported"), mesh=ONE, param_dtype="float32"
  )
  exports.export_hf(
    str(tmp_path / "imported"), str(tmp_path / "exported"), mesh=ONE
  )
  assert tensors(tmp_path / "exported") == tensors(mixed)


@pytest.mark.slow
def test_a_run_from_a_folder_is_exported_without_it(tmp_path):
  """The workdir holds all that an export needs; a run from it goes on."""
  source = tiny_runs.write_model(tmp_path / "source", qk_norm="head")
  folder = tmp_path / "data"
  folder.mkdir()
  sections = tiny_runs.make_sections(
    {"train": tiny_runs.write_rows(folder / "pairs.jsonl", tiny_runs.PAIRS)},
    data__eos_token="j",
    run__init_from=source,
    run__num_steps=3,
    run__eval_every_steps=None,
  )
  sections["model"] = {}
  workdir, out = str(tmp_path / "run"), str(tmp_path / "out")
  config = config_lib.from_config_dict(config_lib.config_dict(**sections))
  result = train.train(config, workdir)
  shutil.rmtree(source)
  exports.export_hf(workdir, out, mesh=MIXED, dtype="float16")
  assert {dtype for dtype, _, _ in tensors(out).values()} == {"F16"}
  generation = read_json(out, "generation_config.json")
  assert generation == {"bos_token_id": 1, "eos_token_id": 13}
  assert tokenizers.load(out).eos_token == "j"
  exports.export_hf(workdir, out + "32", mesh=ONE)
  sections["run"] |= {"init_from": out + "32", "num_steps": 3}
  sections["data"] |= {"bos_token": None, "eos_token": None}
  again = config_lib.from_config_dict(config_lib.config_dict(**sections))
  assert again.model == config.model
  mesh = sharding.make_mesh(again.mesh)
  params = inputs.initial_params(again, mesh)
  jax.tree.map(np.testing.assert_array_equal, params, result.params)


def test_a_model_from_nowhere_becomes_a_family_that_computes_it(tmp_path):
  data = tiny_runs.write_data(tmp_path)
  config = tiny_runs.make_config(data, model__attention_bias=True)
  mesh = sharding.make_mesh(config.mesh)
  params = decoder.make_params(jax.random.key(0), config.model, mesh)
  workdir = tmp_path / "run"
  checkpoints.save_params(str(workdir), params)
  values = json.dumps(config_lib.to_dict(config))
  (workdir / "config.json").write_text(values)
  out = str(tmp_path / "out")
  assert exports.export_hf(str(workdir), out, mesh=ONE).family == "qwen2"
  written = read_json(out, "config.json")
  assert written["architectures"] == ["Qwen2ForCausalLM"]
  assert written["max_position_embeddings"] == config.batch.row_length
  assert written["torch_dtype"] == "float32"
  imported = imports.import_hf(out, str(tmp_path / "imported"), mesh=ONE)
  assert imported == config.model


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_tokens_that_end_generation_stay(source, tmp_path, name):
  """A chat model has several; older ones say them in config.json alone."""
  folder = shutil.copytree(source, tmp_path / "several")
  file = folder / name
  values = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(values | {"eos_token_id": [5, 2]}))
  data = tiny_runs.make_config(
    {"train": "pairs.jsonl", "tokenizer": str(folder)}
  ).data
  kept = tmp_path / "kept"
  hugging_face_files.keep(kept, init_from=str(folder), data=data)
  generation = read_json(kept, "generation_config.json")
  assert generation == {"bos_token_id": 1, "eos_token_id": [5, 2]}


def test_weights_beyond_float16_are_refused(source, tmp_path):
  imported, exported = tmp_path / "imported", tmp_path / "exported"
  imports.import_hf(source, str(imported), mesh=ONE)
  config = config_values.build(
    decoder.DecoderConfig, read_json(imported, "config.json")["model"]
  )
  devices = sharding.make_mesh(ONE)
  params = checkpoints.load_params(
    str(imported), decoder.abstract_params(config, devices)
  )
  scale = params["final_norm"]["scale"]
  # The largest number that still rounds to one of float16 is 65,519.
  params["final_norm"]["scale"] = scale.at[0].set(70_000)
  shutil.rmtree(imported / "checkpoints")
  checkpoints.save_params(str(imported), params)
  with pytest.raises(ValueError, match="final_norm/scale up to 7.014e.04"):
    exports.export_hf(str(imported), str(exported), mesh=ONE, dtype="float16")
  assert not exported.exists()


def test_options_that_were_ignored_do_not_stop_an_export(source, tmp_path):
  odd = shutil.copytree(source, tmp_path / "odd")
  values = read_json(odd, "config.json")
  values["new_trick"] = 3
  values["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, "base": 3}
  (odd / "config.json").write_text(json.dumps(values))
  imported, exported = str(tmp_path / "imported"), str(tmp_path / "exported")
  options = ("new_trick", "base")
  imports.import_hf(str(odd), imported, mesh=ONE, ignored_options=options)
  exports.export_hf(imported, exported, mesh=ONE)
  assert read_json(exported, "config.json").items() >= values.items()


def test_a_copy_of_a_tied_embedding_must_be_one(tmp_path):
  source = tiny_runs.write_model(tmp_path / "tied", tie_word_embeddings=True)
  file = tmp_path / "tied" / "model.safetensors"
  arrays = safetensors.numpy.load_file(file)
  arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
  safetensors.numpy.save_file(arrays, file)
  imports.import_hf(source, str(tmp_path / "imported"), mesh=ONE)
  arrays["lm_head.weight"][-1, -1] += 1
  safetensors.numpy.save_file(arrays, file)
  with pytest.raises(ValueError, match="lm_head.weight differs from model.emb"):
    imports.import_hf(source, str(tmp_path / "again"), mesh=ONE)
  assert not (tmp_path / "again").exists()


def test_a_run_from_a_folder_that_does_not_fit_leaves_nothing(source, tmp_path):
  def start(folder):
    data = {"train": tiny_runs.write_rows(tmp_path / "rows", tiny_runs.PAIRS)}
    sections = tiny_runs.make_sections(data, run__init_from=str(folder))
    sections["model"] = {}
    config = config_lib.from_config_dict(config_lib.config_dict(**sections))
    train.train(config, str(tmp_path / "run"))

  broken = shutil.copytree(source, tmp_path / "broken")
  file = broken / "model.safetensors"
  arrays = safetensors.numpy.load_file(file)
  del arrays["model.norm.weight"]
  safetensors.numpy.save_file(arrays, file)
  with pytest.raises(ValueError, match="missing.* model.norm.weight"):
    start(broken)
  shutil.copy(pathlib.Path(source) / "model.safetensors", file)
  vocabulary = json.loads((broken / "tokenizer.json").read_text())
  vocabulary["model"]["vocab"] |= {chr(65 + i): 14 + i for i in range(3)}
  (broken / "tokenizer.json").write_text(json.dumps(vocabulary))
  with pytest.raises(
    ValueError, match="17 tokens for text, .*vocab_size is 16"
  ):
    start(broken)
  assert not (tmp_path / "run").exists()


def test_mistakes_are_named_and_leave_nothing(source, tmp_path):
  def import_it(path=source, **options):
    imports.import_hf(str(path), str(tmp_path / "out"), mesh=MIXED, **options)

  broken = shutil.copytree(source, tmp_path / "broken")
  file = broken / "model.safetensors"
  content = file.read_bytes()
  file.write_bytes(content[:-10])
  with pytest.raises(ValueError, match="model.safetensors"):
    import_it(broken)
  file.unlink()
  with pytest.raises(ValueError, match="safetensors"):
    import_it(broken)
  with pytest.raises(FileNotFoundError, match="no config.json in '.*nowhere'"):
    import_it(tmp_path / "nowhere")
  file.write_bytes(content)
  vocabulary = json.loads((broken / "tokenizer.json").read_text())
  vocabulary["model"]["vocab"] |= {chr(65 + i): 14 + i for i in range(3)}
  (broken / "tokenizer.json").write_text(json.dumps(vocabulary))
  with pytest.raises(
    ValueError, match="17 tokens for text, .*vocab_size is 16"
  ):
    import_it(broken)
  for broken_file, text in (
    ("generation_config.json", "{"),
    ("generation_config.json", "[1]"),
    ("tokenizer_config.json", "{"),
  ):
    again = shutil.copytree(source, tmp_path / "again")
    (again / broken_file).write_text(text)
    with pytest.raises(ValueError, match=broken_file):
      import_it(again)
    shutil.rmtree(again)
  file.unlink()
  (broken / safetensors_files.INDEX).write_text('{"weight_map": {}}')
  with pytest.raises(ValueError, match="None of the tensors in .*broken is of"):
    import_it(broken)
  with pytest.raises(ValueError, match="is a Hugging Face folder already"):
    exports.export_hf(source, str(tmp_path / "out"), mesh=ONE)
  with pytest.raises(ValueError, match="no complete checkp.* expected a workd"):
    exports.export_hf(str(tmp_path), str(tmp_path / "out"), mesh=ONE)
  assert [path.name for path in tmp_path.iterdir()] == ["broken"]
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "precious").write_text("")
  with pytest.raises(FileExistsError, match="something in .*out already"):
    import_it()
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
