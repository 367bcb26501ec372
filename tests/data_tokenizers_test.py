"""Tokenizers of both kinds, and what is said about those that will not do."""

import json
import unicodedata

import hypothesis
import pytest
import sentencepiece
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
  # Without a vocabulary, transformers makes up one of three tokens.
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "LlamaTokenizer"})
  )
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


def sentencepiece_folder(tmp_path, shared_data, config, **files):
  """A folder of the SentencePiece model and settings, no tokenizer.json."""
  tmp_path.mkdir(exist_ok=True)
  model = (shared_data / SENTENCEPIECE).read_bytes()
  (tmp_path / "tokenizer.model").write_bytes(model)
  for name, value in (files | {"tokenizer_config": config}).items():
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
  return str(tmp_path)


def declared(text, **options):
  flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
  return dict.fromkeys(flags, False) | {"content": text} | options


LLAMA = {
  "tokenizer_class": "LlamaTokenizer",
  "bos_token": declared("<s>", __type="AddedToken"),
  "eos_token": "</s>",
  "unk_token": "<unk>",
}


def test_sentencepiece_itself_reads_a_folder_without_tokenizer_json(
  tmp_path, shared_data
):
  folder = sentencepiece_folder(tmp_path, shared_data, LLAMA)
  tokenizer = tokenizers.load(folder)
  model = sentencepiece.SentencePieceProcessor(
    model_file=str(shared_data / SENTENCEPIECE)
  )
  texts = ["Hello, how are you?", "  double  spaces", "2+2=4", ""]
  assert tokenizer.encode_all(texts) == model.encode(texts)
  # transformers makes other ids of it, hence this path.
  import transformers

  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert theirs(texts, add_special_tokens=False)["input_ids"] != (
    model.encode(texts)
  )


def test_tokenizer_json_is_read_where_a_folder_has_both(tmp_path, shared_data):
  folder = sentencepiece_folder(tmp_path, shared_data, {"eos_token": "</s>"})
  (tmp_path / "tokenizer.json").write_bytes(
    (shared_data / STORIES / "tokenizer.json").read_bytes()
  )
  assert tokenizers.load(folder).vocab_size == 512


def test_sentencepiece_takes_its_settings_from_the_folder(
  tmp_path, shared_data
):
  load_folder = lambda number, config, **files: tokenizers.load(
    sentencepiece_folder(tmp_path / number, shared_data, config, **files)
  )
  tokenizer = load_folder("0", LLAMA | {"chat_template": "{{ unk_token }}!"})
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.adds_bos
  assert tokenizer.render(MESSAGES, add_generation_prompt=True) == "<unk>!"
  # Named in the settings, it is a special token.
  assert tokenizer.encode("<unk>") == [0]
  for number, config, adds_bos, bos_id in (
    ("1", {"add_bos_token": True, "add_eos_token": True}, True, 1),
    ("2", {"add_bos_token": False}, False, 1),
    ("3", {"bos_token": None}, False, None),
  ):
    tokenizer = load_folder(number, LLAMA | config)
    assert (tokenizer.adds_bos, tokenizer.bos_id) == (adds_bos, bos_id)
    # Where EOS goes is not for the tokenizer to say.
    assert tokenizer.encode("a")[-1] != tokenizer.eos_id
  tokens = {"eos_token": "<s>", "bos_token": {"content": "</s>"}}
  tokenizer = load_folder("4", {}, special_tokens_map=tokens)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
  given = tokenizers.load(
    str(tmp_path / "2"), bos_token="</s>", eos_token="<s>"
  )
  assert (given.bos_id, given.eos_id, given.adds_bos) == (2, 1, True)


def test_sentencepiece_with_added_tokens(tmp_path, shared_data):
  config = LLAMA | {
    "eos_token": "<|im_end|>",
    "added_tokens_decoder": {
      "1000": declared("<|im"),
      "1001": declared("<|im_end|>", special=True),
      "1003": declared("<pad>", lstrip=True, rstrip=True),
      # Instead of the piece "the".
      "7": declared("<slot>"),
    },
  }
  folder = sentencepiece_folder(
    tmp_path,
    shared_data,
    config,
    added_tokens={"<|im_later|>": 1005, "<|im": 1000},
  )
  tokenizer = tokenizers.load(folder)
  assert tokenizer.vocab_size == 1006
  assert tokenizer.eos_id == 1001
  (hello,) = tokenizer.encode_continuations(["Hello"])
  # The longest of the tokens is meant, and no space goes behind any of them.
  assert tokenizer.encode("a<|im_end|>Hello<|im_later|><|im<slot>") == (
    [*tokenizer.encode("a"), 1001, *hello, 1005, 1000, 7]
  )
  text = "a<|im_end|>Hello<|im_later|><|im<slot> b"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.encode("a <pad> \nHello") == (
    [*tokenizer.encode("a"), 1003, *hello]
  )


def test_added_tokens_beyond_the_vocabulary_count(tmp_path, shared_data):
  def stories_folder(number, config):
    (tmp_path / number).mkdir()
    (tmp_path / number / "tokenizer.json").write_bytes(
      (shared_data / STORIES / "tokenizer.json").read_bytes()
    )
    (tmp_path / number / "tokenizer_config.json").write_text(
      json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    )
    return str(tmp_path / number)

  tokens = {"512": declared("<|im_end|>", special=True), "513": declared("<x>")}
  config = {"eos_token": "<|im_end|>", "added_tokens_decoder": tokens}
  tokenizer = tokenizers.load(stories_folder("0", config))
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (514, 512)
  assert tokenizer.encode("<|im_end|><x>") == [512, 513]
  # What a folder names without an id gets the next one, as in transformers.
  config = {"eos_token": "</s>", "pad_token": "[PAD]"}
  tokenizer = tokenizers.load(stories_folder("1", config))
  assert tokenizer.vocab_size == 513
  # transformers gives a token the next id, whatever the folder says.
  config = {
    "eos_token": "</s>",
    "added_tokens_decoder": {"600": declared("!?")},
  }
  with pytest.raises(ValueError, match="'!\\?' has the id 600, but it is load"):
    tokenizers.load(stories_folder("2", config))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"added_tokens_decoder": {"x": declared("a")}}, "The added tokens of"),
    ({"added_tokens_decoder": {"1": "a"}}, "The added tokens of"),
    ({"added_tokens_decoder": {"1": {}}}, "The added tokens of"),
    (
      {"added_tokens_decoder": {"1": declared("a", single_word=True)}},
      "the token 'a' is single_word",
    ),
    ({"eos_token": "<nix>"}, "'<nix>' is not in the vocabulary"),
  ],
)
def test_settings_that_cannot_be_used_are_one_sentence(
  tmp_path, shared_data, config, message
):
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.load(sentencepiece_folder(tmp_path, shared_data, config))
  assert "\n" not in str(caught.value)


def test_code_of_a_folder_is_not_run(tmp_path, capfd):
  (tmp_path / "vocab.json").write_text('{"a": 0}')
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
  )
  (tmp_path / "code.py").write_text("print('ran')\nclass Tokenizer: pass")
  with pytest.raises(ValueError, match="cannot be read"):
    tokenizers.load(str(tmp_path))
  # Nor does it ask whether to, of a terminal where nobody sits.
  assert "ran" not in (out := capfd.readouterr().out) and "y/N" not in out


def test_cutting_and_padding_of_tokenizer_json_are_off(tmp_path, shared_data):
  own = json.loads((shared_data / STORIES / "tokenizer.json").read_text())
  own["truncation"] = {
    "direction": "Right",
    "max_length": 4,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  own["padding"] = {
    "strategy": {"Fixed": 8},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(own))
  tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
  expected = tokenizers.load(str(shared_data / STORIES))
  texts = ["a", "Once upon a time there was a cat."]
  assert tokenizer.encode_all(texts) == expected.encode_all(texts)
