"""Tokenizers of both kinds, and what is said about those that will not do."""

import json
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies

from dpop_jax.data import chat_templates, tokenizers

NEOX = "tokenizers/gpt-neox-olmo"
TINY_BPE = "tokenizers/torchtune/tiny_bpe_tokenizer.json"
NO_EOS = "tokenizers/torchtune/tokenizer.json"
SENTENCEPIECE = "tokenizers/sentencepiece/test_model.model"
STORIES = "models/stories260K"
MESSAGES = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "2+2?"},
]
TEXTS = strategies.text(max_size=40)
# The tiny BPE leaves out, without a word, bytes that its vocabulary lacks, and
# the SentencePiece model has one id for all that it does not know.
PLAIN_TEXTS = strategies.text("abc XYZ,.'019", max_size=40)
KNOWN_TEXTS = strategies.text("abcde ,.", max_size=40)


@pytest.fixture(scope="module")
def load(shared_data):
  """Loads a tokenizer once, by its name under the shared data."""
  loaded = {}

  def load(name, **options):
    key = name, *options.items()
    if key not in loaded:
      loaded[key] = tokenizers.load(str(shared_data / name), **options)
    return loaded[key]

  return load


@pytest.mark.parametrize(
  ("name", "vocab_size", "bos", "eos", "adds_bos"),
  [
    (NEOX, 50280, ("", None), ("<|endoftext|>", 50279), False),
    (f"{NEOX}/tokenizer.json", 50280, ("", None), ("<|endoftext|>", 50279), 0),
    (TINY_BPE, 2003, ("", None), ("<|endoftext|>", 2000), False),
    (STORIES, 512, ("<s>", 1), ("</s>", 2), True),
    (f"{STORIES}/tokenizer.json", 512, ("<s>", 1), ("</s>", 2), True),
    (SENTENCEPIECE, 1000, ("<s>", 1), ("</s>", 2), True),
  ],
)
def test_sizes_and_special_tokens(load, name, vocab_size, bos, eos, adds_bos):
  tokenizer = load(name)
  assert tokenizer.vocab_size == vocab_size
  assert (tokenizer.bos_token, tokenizer.bos_id) == bos
  assert (tokenizer.eos_token, tokenizer.eos_id) == eos
  assert tokenizer.adds_bos == adds_bos


def test_tokenizers_without_eos_are_refused_by_name(shared_data):
  for name in (NO_EOS, "tokenizers/torchtune"):
    with pytest.raises(ValueError, match="set data.eos_token to the text"):
      tokenizers.load(str(shared_data / name))


def test_special_tokens_named_in_the_config(load):
  tokenizer = load(NEOX, eos_token="<|padding|>", bos_token="<|endoftext|>")
  assert (tokenizer.eos_id, tokenizer.bos_id) == (1, 50279)
  # Whoever names one wants it.
  assert tokenizer.adds_bos
  for name in (NEOX, SENTENCEPIECE):
    for option in ("eos_token", "bos_token"):
      with pytest.raises(ValueError, match=f"data.{option} '<nix>' is not in"):
        load(name, **{option: "<nix>"})
  # Nothing was added to make room for it.
  assert load(NEOX).vocab_size == 50280


def test_missing_and_broken_tokenizers_are_one_sentence(tmp_path):
  with pytest.raises(
    FileNotFoundError, match="data.tokenizer should be a Hugg"
  ):
    tokenizers.load(str(tmp_path / "nowhere"))
  with pytest.raises(
    FileNotFoundError, match="data.tokenizer should be a Hugg"
  ):
    tokenizers.load(str(tmp_path))
  for name in ("tokenizer.json", "x.model"):
    (tmp_path / name).write_text("hello")
    with pytest.raises(ValueError, match="data.tokenizer") as caught:
      tokenizers.load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_may_hold_nothing_but_a_sentencepiece_model(
  tmp_path, shared_data
):
  (tmp_path / "tokenizer.model").write_bytes(
    (shared_data / SENTENCEPIECE).read_bytes()
  )
  assert tokenizers.load(str(tmp_path)).vocab_size == 1000
  assert tokenizers.files(str(tmp_path)) == (tmp_path / "tokenizer.model",)


def test_special_tokens_map_beside_tokenizer_json(tmp_path, shared_data):
  (tmp_path / "tokenizer.json").write_bytes(
    (shared_data / NEOX / "tokenizer.json").read_bytes()
  )
  (tmp_path / "special_tokens_map.json").write_text(
    json.dumps({"eos_token": {"content": "<|padding|>"}})
  )
  assert tokenizers.load(str(tmp_path)).eos_id == 1


@hypothesis.given(TEXTS)
def test_neox_decodes_to_what_was_encoded_in_normal_form(load, text):
  tokenizer = load(NEOX)
  expected = unicodedata.normalize("NFC", text)
  assert tokenizer.decode(tokenizer.encode(text)) == expected


@hypothesis.given(TEXTS)
def test_llama_with_byte_fallback_decodes_to_what_was_encoded(load, text):
  # ▁ is how Llama writes a space.
  text = text.replace("▁", "_")
  tokenizer = load(STORIES)
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", [NEOX, TINY_BPE, STORIES])
@hypothesis.given(before=PLAIN_TEXTS, after=PLAIN_TEXTS)
def test_continuations_decode_to_the_text_that_goes_on(
  load, name, before, after
):
  tokenizer = load(name)
  ids = tokenizer.encode(before)
  ids += (
    tokenizer.encode_continuations([after])[0]
    if ids
    else tokenizer.encode(after)
  )
  assert tokenizer.decode(ids) == before + after


@hypothesis.given(before=KNOWN_TEXTS, after=KNOWN_TEXTS)
def test_sentencepiece_continues_up_to_its_own_normalisation(
  load, before, after
):
  # This model drops spaces at both ends and all but one in between.
  squeeze = lambda text: " ".join(text.split())
  tokenizer = load(SENTENCEPIECE)
  hypothesis.assume(before.strip())
  before = before.rstrip()
  ids = tokenizer.encode(before) + tokenizer.encode_continuations([after])[0]
  assert tokenizer.decode(ids) == squeeze(before + after)


def test_llama_puts_a_space_before_a_text_and_not_before_its_continuation(load):
  for name in (STORIES, SENTENCEPIECE):
    tokenizer = load(name)
    spaced, glued = tokenizer.encode_continuations([" Hello", "Hello"])
    assert tokenizer.encode("Hello") == spaced
    assert spaced != glued


def test_unknown_characters_are_not_lost_behind_the_sentinel(load):
  # Two unknown characters in a row are one id; so a sentinel must be known.
  tokenizer = load(SENTENCEPIECE)
  unknown = 0
  assert tokenizer.encode_continuations(["☃☃"]) == [[unknown]]


def test_text_of_special_tokens_is_the_token(load):
  assert load(NEOX).encode("a<|endoftext|>") == [66, 50279]
  for name in (STORIES, SENTENCEPIECE):
    tokenizer = load(name)
    ids = tokenizer.encode("<s>Hello</s> there<s>")
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1]
    assert ids[0] == 1 and ids[-1] == 1
    assert tokenizer.encode_continuations(["Hello</s>"])[0][-1] == 2
  tokenizer = load(SENTENCEPIECE)
  assert tokenizer.decode(tokenizer.encode("<s>He llo</s> there")) == (
    "<s>He llo</s> there"
  )
  # Only where a text begins does it get a space.
  assert tokenizer.encode("<s>Hello") == [1, *tokenizer.encode("Hello")]
  (glued,) = tokenizer.encode_continuations(["Hello"])
  assert tokenizer.encode("a</s>Hello")[-len(glued) - 1 :] == [2, *glued]


def test_many_texts_give_what_each_gives(load):
  texts = ["Hello", "", "a</s>b", " x ", "<s>"]
  for name in (NEOX, STORIES, SENTENCEPIECE):
    tokenizer = load(name)
    assert tokenizer.encode_all(texts) == [tokenizer.encode(t) for t in texts]
    assert tokenizer.encode_all([]) == []
    assert tokenizer.encode_continuations([]) == []


@pytest.mark.parametrize("name", [NEOX, SENTENCEPIECE])
def test_chatml_by_name(load, name):
  tokenizer = load(name, chat_template="chatml")
  system = "<|im_start|>system\nBe brief.<|im_end|>\n"
  user = "<|im_start|>user\n2+2?<|im_end|>\n"
  answer = {"role": "assistant", "content": " 4 \n"}
  assert tokenizer.render(MESSAGES, add_generation_prompt=True) == (
    system + user + "<|im_start|>assistant\n"
  )
  assert tokenizer.render([*MESSAGES, answer], add_generation_prompt=False) == (
    system + user + "<|im_start|>assistant\n 4 \n<|im_end|>\n"
  )


def test_templates_from_text_file_and_folder(load, tmp_path, shared_data):
  template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
  file = tmp_path / "chat_template.jinja"
  file.write_text(template)
  for given in (template, str(file)):
    tokenizer = load(SENTENCEPIECE, chat_template=given)
    text = tokenizer.render(MESSAGES, add_generation_prompt=True)
    assert text == "<s>Be brief.2+2?"
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (tmp_path / name).write_bytes((shared_data / STORIES / name).read_bytes())
  tokenizer = tokenizers.load(str(tmp_path))
  assert tokenizer.chat_template == template


def test_messages_without_a_template_are_refused(load):
  for name in (NEOX, SENTENCEPIECE):
    with pytest.raises(ValueError, match="set data.chat_template"):
      load(name).render(MESSAGES, add_generation_prompt=True)


def test_faulty_templates_are_one_sentence(load):
  for template, message in (
    ("{{ raise_exception('no system turn') }}", "no system turn"),
    ("{% for %}", "does not take"),
    ("{{ messages[0].content + 1 }}", "does not take"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
  ):
    tokenizer = load(SENTENCEPIECE, chat_template=template)
    with pytest.raises(ValueError, match=message):
      tokenizer.render(MESSAGES, add_generation_prompt=True)
  with pytest.raises(ValueError, match="data.chat_template should be a Jinja"):
    chat_templates.read("chatlm")
