"""The written tokenizer is that of the run, for us and for transformers."""

import json

import pytest
import transformers

from dpop_jax.data import tokenization, tokenizer_export, tokenizers

NEOX = "tokenizers/gpt-neox-olmo"
TINY_BPE = "tokenizers/torchtune/tiny_bpe_tokenizer.json"
SENTENCEPIECE = "tokenizers/sentencepiece/test_model.model"
STORIES = "models/stories260K"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
MESSAGES = [{"role": "user", "content": "Süße 2+2?"}]
OPTIONS = [
  {},
  {"chat_template": TEMPLATE},
  {"chat_template": "chatml", "add_bos": True},
  {"add_bos": False},
  {"bos_token": ..., "eos_token": ..., "chat_template": TEMPLATE},
]
# What may stand for BOS and EOS.
TOKENS = {
  STORIES: ("</s>", "<s>"),
  TINY_BPE: ("<|endoftext|>", "<|endoftext|>"),
  SENTENCEPIECE: ("</s>", "<s>"),
}


@pytest.fixture(scope="module")
def texts(shared_data):
  rows = json.loads(
    (shared_data / "prefs/llamafactory_dpo_en_demo.json").read_text()
  )
  return [row["chosen"]["value"] for row in rows[::6]] + ["<s> a</s>b<unk>"]


def write(folder, contents):
  for name, content in contents.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  return str(folder)


def assert_same(folder, path, texts, options):
  """The folder alone is what the path was with the options."""
  loaded = {key: value for key, value in options.items() if key != "add_bos"}
  ours = tokenizers.load(path, **loaded)
  copy = tokenizers.load(folder)
  begins = tokenization.uses_bos(ours, options.get("add_bos"))
  assert copy.adds_bos == begins
  assert (copy.eos_id, copy.bos_id) == (ours.eos_id, ours.bos_id)
  assert copy.vocab_size == ours.vocab_size
  assert copy.chat_template == ours.chat_template
  assert copy.encode_all(texts) == ours.encode_all(texts)
  tokenizer_export.check(folder, ours)
  if path.endswith(".model"):
    # What transformers makes of it has other ids in any case.
    return
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ids = theirs(texts, add_special_tokens=False)["input_ids"]
  assert ids == ours.encode_all(texts)
  bos = [ours.bos_id] * begins
  assert theirs(texts)["input_ids"] == [bos + each for each in ids]
  assert theirs.eos_token_id == ours.eos_id
  if ours.chat_template is not None:
    text = theirs.apply_chat_template(
      MESSAGES, add_generation_prompt=True, tokenize=False
    )
    assert text == ours.render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize(
  "options", OPTIONS, ids=lambda options: "+".join(options)
)
@pytest.mark.parametrize("name", [STORIES, TINY_BPE, SENTENCEPIECE])
def test_an_exported_folder_needs_no_options(
  tmp_path, shared_data, texts, name, options
):
  path = str(shared_data / name)
  tokens = dict(zip(("bos_token", "eos_token"), TOKENS[name], strict=True))
  options = options | {key: tokens[key] for key in tokens if key in options}
  if name == TINY_BPE and options.get("add_bos"):
    # It has none of its own.
    options = options | {"bos_token": tokens["bos_token"]}
  contents = tokenizer_export.contents(path, **options)
  folder = write(tmp_path, contents)
  assert_same(folder, path, texts, options)
  # And what is exported from there is the same again.
  assert tokenizer_export.contents(folder) == contents


def test_neox_is_exported_with_its_real_vocabulary(
  tmp_path, shared_data, texts
):
  options = {"bos_token": "<|endoftext|>", "chat_template": "chatml"}
  contents = tokenizer_export.contents(str(shared_data / NEOX), **options)
  folder = write(tmp_path, contents)
  assert_same(folder, str(shared_data / NEOX), texts, options)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "phi3"])
def test_a_lone_file_is_the_same_beside_a_model(
  tmp_path, shared_data, texts, model_type
):
  path = str(shared_data / STORIES / "tokenizer.json")
  folder = write(tmp_path, tokenizer_export.contents(path))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
  assert_same(folder, path, texts, {})


def test_what_nobody_changed_is_copied(shared_data):
  contents = tokenizer_export.contents(str(shared_data / STORIES))
  assert contents == {
    name: (shared_data / STORIES / name).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json")
  }


def test_files_get_the_names_that_they_have_in_a_folder(tmp_path, shared_data):
  for name, exported in (
    ("spm.model", "tokenizer.model"),
    ("my.json", "tokenizer.json"),
  ):
    file = tmp_path / name
    file.touch()
    assert tokenizers.export_files(str(file)) == {exported: file}
  folder = tmp_path / "folder"
  names = {
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
  }
  others = {"config.json", "model.safetensors", "generation_config.json"}
  write(folder, dict.fromkeys(names | others, b""))
  files = tokenizers.export_files(str(folder))
  assert files == {name: folder / name for name in names}
  with pytest.raises(FileNotFoundError, match="data.tokenizer should be"):
    tokenizers.export_files(str(tmp_path / "nowhere"))


def test_all_places_of_a_changed_setting_are_changed(tmp_path, shared_data):
  tokenizer = (shared_data / STORIES / "tokenizer.json").read_bytes()
  config = {"bos_token": None, "eos_token": "</s>", "chat_template": "old"}
  source = write(
    tmp_path / "source",
    {
      "tokenizer.json": tokenizer,
      "tokenizer_config.json": json.dumps(config).encode(),
      "special_tokens_map.json": b'{"eos_token": "</s>", "unk_token": "<unk>"}',
      "chat_template.json": b'{"chat_template": "old"}',
      "additional_chat_templates/rag.jinja": b"rag",
    },
  )
  contents = tokenizer_export.contents(
    source, eos_token="<s>", chat_template=TEMPLATE
  )
  assert contents.keys() == {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
  }
  # What is null in a file means that there is none.
  assert json.loads(contents["tokenizer_config.json"]) == {
    "bos_token": None,
    "eos_token": "<s>",
  }
  assert json.loads(contents["special_tokens_map.json"]) == {
    "eos_token": "<s>",
    "unk_token": "<unk>",
  }
  assert contents["chat_template.jinja"] == TEMPLATE.encode()
  assert contents["tokenizer.json"] == tokenizer


def test_templates_that_transformers_does_not_read_are_written_as_it_does(
  tmp_path, shared_data
):
  source = write(
    tmp_path,
    {
      "tokenizer.json": (shared_data / STORIES / "tokenizer.json").read_bytes(),
      "tokenizer_config.json": b'{"eos_token": "</s>"}',
      "chat_template.json": b'{"chat_template": "of a processor"}',
    },
  )
  contents = tokenizer_export.contents(source)
  assert contents["chat_template.jinja"] == b"of a processor"


def test_another_tokenizer_is_noticed(tmp_path, shared_data):
  path = str(shared_data / STORIES)
  folder = write(tmp_path, tokenizer_export.contents(path))
  tokenizer = tokenizers.load(path)
  tokenizer_export.check(folder, tokenizer)
  # Of a Qwen 2, transformers reads any tokenizer.json as one of bytes.
  (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
  with pytest.raises(ValueError, match="gives other ids than .*type of the mo"):
    tokenizer_export.check(folder, tokenizer)
  (tmp_path / "config.json").unlink()
  (tmp_path / "chat_template.jinja").write_text("other")
  with pytest.raises(ValueError, match="has the chat_template 'other', but"):
    tokenizer_export.check(folder, tokenizer)
