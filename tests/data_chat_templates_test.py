"""Chat templates on real pairs, in every tokenizer, and as others read them."""

import json
import re
import unicodedata

import pytest
import sentencepiece

from dpop_jax.data import (
  chat_templates,
  preferences,
  sources,
  tokenization,
  tokenizers,
)

NEOX = "tokenizers/gpt-neox-olmo"
TINY_BPE = "tokenizers/torchtune/tiny_bpe_tokenizer.json"
NO_EOS_BPE = "tokenizers/torchtune/tokenizer.json"
SENTENCEPIECE = "tokenizers/sentencepiece/test_model.model"
STORIES = "models/stories260K"

# In the manner of Llama 2, Llama 3, Zephyr, and Gemma, which trims.
LLAMA_2 = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}
  {%- set system = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -%}
  {%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('Turns must alternate') }}
  {%- endif -%}
  {%- set content = (system if loop.first else '') + message['content'] -%}
  {%- if message['role'] == 'user' -%}
    {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- else -%}
    {{ ' ' + content.strip() + ' ' + eos_token }}
  {%- endif -%}
{%- endfor -%}"""
LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
  {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
  {{- message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TRIMMING = """\
{%- for message in messages -%}
{{ '<turn>' + message.role + '\\n' + message.content.strip() + '</turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>assistant\\n' }}{%- endif -%}"""


def chatml_text(turns, bos, eos):
  del bos, eos
  return "".join(
    f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns
  )


def llama_2_text(turns, bos, eos):
  if turns[0][0] == "system":
    (_, system), (_, user), *rest = turns
    user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
    turns = [("user", user), *rest]
  return "".join(
    f"{bos}[INST] {text.strip()} [/INST]"
    if role == "user"
    else f" {text.strip()} {eos}"
    for role, text in turns
  )


def llama_3_text(turns, bos, eos):
  del eos
  return bos + "".join(
    f"<|start|>{role}<|end|>\n\n{text.strip()}<|eot|>" for role, text in turns
  )


def zephyr_text(turns, bos, eos):
  del bos
  return "".join(f"<|{role}|>\n{text}{eos}\n" for role, text in turns)


def trimming_text(turns, bos, eos):
  del bos, eos
  return "".join(
    f"<turn>{role}\n{text.strip()}</turn>\n" for role, text in turns
  )


TEMPLATES = [
  (chat_templates.CHATML, chatml_text),
  (LLAMA_2, llama_2_text),
  (LLAMA_3, llama_3_text),
  (ZEPHYR, zephyr_text),
  (TRIMMING, trimming_text),
]


@pytest.fixture(scope="module")
def chat_pairs(shared_data):
  """300 real conversations and 419 real instructions, with two answers each."""
  path = shared_data / "prefs/llamafactory_dpo_en_demo.json"
  examples = [
    preferences.parse_preference(row.value) for row in sources.read(str(path))
  ]
  for file in sorted((shared_data / "prefs/llmbar").glob("*.json")):
    for row in json.loads(file.read_text()):
      prompt = [{"role": "user", "content": row["input"]}]
      answers = row["output_1"], row["output_2"]
      examples.append(preferences.Example(prompt, *answers))
  assert len(examples) == 719
  return examples


@pytest.fixture(scope="module")
def llama_model(chat_pairs, tmp_path_factory):
  """A SentencePiece model with the settings of Llama's."""
  texts = [example.chosen for example in chat_pairs[:300]]
  path = tmp_path_factory.mktemp("sentencepiece") / "llama.model"
  with path.open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=file,
      model_type="bpe",
      vocab_size=600,
      byte_fallback=True,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      character_coverage=0.99,
      max_sentence_length=100_000,
      minloglevel=2,
    )
  return path


def neox_form(text, tokenizer):
  """NeoX normalises; of these texts none is changed by it."""
  del tokenizer
  return unicodedata.normalize("NFC", text)


def as_is(text, tokenizer):
  del tokenizer
  return text


def tiny_bpe_form(text, tokenizer):
  """Bytes that the vocabulary lacks are left out, without a word."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in shown]
  letters = {byte: chr(byte) for byte in shown}
  letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
  vocabulary = tokenizer._tokenizer.get_vocab()
  text = unicodedata.normalize("NFC", text).encode()
  known = bytes(byte for byte in text if letters[byte] in vocabulary)
  return known.decode(errors="replace")


def stories_form(text, tokenizer):
  """A space goes before whatever follows a special token inside a text."""
  del tokenizer
  return re.sub(r"(<s>|</s>)(?!<s>|</s>|$)", r"\1 ", text)


def squeezed(text):
  """Without white space and special tokens, unknown ones taken together."""
  text = "".join(re.sub("<s>|</s>", "", text).split())
  return re.sub("⁇+", "⁇", text)


def sentencepiece_form(text, tokenizer):
  """What the model leaves of a text, but for spaces."""
  model = tokenizer._model
  parts = re.split("<s>|</s>", text)
  return squeezed("".join(model.decode(model.encode(part)) for part in parts))


@pytest.mark.parametrize(
  ("name", "eos_token", "form", "stride"),
  [
    (NEOX, None, neox_form, 6),
    (TINY_BPE, None, tiny_bpe_form, 6),
    (NO_EOS_BPE, "!", as_is, 6),
    (STORIES, None, stories_form, 6),
    (SENTENCEPIECE, None, sentencepiece_form, 1),
    (None, None, as_is, 1),
  ],
  ids=["neox", "tiny bpe", "bpe", "stories", "sentencepiece", "llama"],
)
def test_prompt_and_answer_decode_to_the_text_that_was_given(
  shared_data, chat_pairs, llama_model, name, eos_token, form, stride
):
  path = llama_model if name is None else shared_data / name
  num_answers = 0
  # Each template gets other pairs, the last one those of all the others.
  for number, (template, write) in enumerate([*TEMPLATES, (None, None)]):
    tokenizer = tokenizers.load(
      str(path), eos_token=eos_token, chat_template=template
    )
    examples = chat_pairs[number * stride :: len(TEMPLATES) * stride]
    if template is None:
      examples = [
        example._replace(prompt=f"{example.prompt[-1]['content']}\n\nAnswer: ")
        for example in chat_pairs[:: 3 * stride]
      ]
    encoded = tokenization.encode(examples, tokenizer, add_bos=None)
    for example, ids in zip(examples, encoded, strict=True):
      if isinstance(ids, preferences.BadRow):
        assert ids.reason == "identical answers"
        continue
      for side in ("chosen", "rejected"):
        answer = getattr(example, side)
        if template is None:
          text = example.prompt + answer
        else:
          turns = [(turn["role"], turn["content"]) for turn in example.prompt]
          turns.append(("assistant", answer))
          text = write(turns, tokenizer.bos_token, tokenizer.eos_token)
        # There is one EOS, and nothing behind it.
        if text.rstrip().endswith(tokenizer.eos_token):
          text = text.rstrip().removesuffix(tokenizer.eos_token)
        if ids.has_bos:
          text = text.removeprefix(tokenizer.bos_token)
        assert ids.has_bos == tokenizer.adds_bos
        answer_ids = getattr(ids, side)
        assert answer_ids[-1] == tokenizer.eos_id
        decoded = tokenizer.decode(ids.prompt[ids.has_bos :] + answer_ids[:-1])
        if form is sentencepiece_form:
          decoded = squeezed(decoded)
        assert decoded == form(text, tokenizer)
        num_answers += 1
  assert num_answers > 1800 // stride


@pytest.mark.parametrize("name", [SENTENCEPIECE, None])
def test_ids_of_a_sentencepiece_model_are_its_own(
  shared_data, chat_pairs, llama_model, name
):
  path = str(llama_model if name is None else shared_data / name)
  texts = [
    text
    for example in chat_pairs
    for text in (example.prompt[-1]["content"], example.chosen)
  ]
  model = sentencepiece.SentencePieceProcessor(model_file=path)
  assert tokenizers.load(path).encode_all(texts) == model.encode(texts)


MESSAGES = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "  2+2? "},
  {"role": "assistant", "content": "4\n"},
  {"role": "user", "content": "Sure?"},
]
# What templates of real models use.
FEATURES = """\
{%- if tools is not none %}{{ 'Tools: ' + tools | tojson }}{% endif -%}
{%- if documents %}{{ 'Documents' }}{% endif -%}
{%- set seen = namespace(last='') -%}
{%- macro header(role) -%}{{ '<' ~ role ~ '>' }}{%- endmacro -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
  {%- if message.tool_calls is defined -%}{{ message.tool_calls | tojson }}
  {%- endif -%}
  {%- set seen.last = message.role -%}
  {{ header(message.role) }}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{ message.content }}{{ eos_token }}{%- endgeneration -%}
  {%- else -%}{{ message['content'] | trim }}{%- endif -%}
  {%- if loop.index > 3 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{ seen.last ~ unk_token }}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif -%}"""


def render(template, messages=None, **options):
  return chat_templates.render(
    template,
    MESSAGES if messages is None else messages,
    add_generation_prompt=True,
    special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    **options,
  )


def folder_of(tmp_path, shared_data, config=None, **files):
  """A copy of the tokenizer of stories260K with other settings."""
  files = {"tokenizer_config.json": json.dumps(config or {})} | files
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(text)
  tokenizer = (shared_data / STORIES / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(tokenizer)
  return str(tmp_path)


TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
  "template",
  [FEATURES, *(template for template, _ in TEMPLATES)],
  ids=["features", "chatml", "llama 2", "llama 3", "zephyr", "trimming"],
)
def test_templates_of_a_folder_write_what_they_write_in_transformers(
  tmp_path, shared_data, template
):
  import transformers

  folder = folder_of(
    tmp_path, shared_data, TOKENS | {"chat_template": template}
  )
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  text = tokenizers.load(folder).render(MESSAGES, add_generation_prompt=True)
  assert text == theirs.apply_chat_template(
    MESSAGES, add_generation_prompt=True, tokenize=False
  )
  if template is FEATURES:
    assert text == (
      "<user>2+2?<assistant>4\n</s><user>Sure?user<unk><assistant>"
    )


def test_where_a_folder_keeps_its_templates(tmp_path, shared_data):
  named = [
    {"name": "tool_use", "template": "{{ 'tools' }}"},
    {"name": "default", "template": "{{ 'named' }}"},
  ]
  config, jinja, processor, extra = (
    {"tokenizer_config": TOKENS | {"chat_template": "{{ 'config' }}"}},
    {"chat_template.jinja": "{{ 'jinja' }}"},
    {"chat_template.json": json.dumps({"chat_template": "{{ 'json' }}"})},
    {"additional_chat_templates/rag.jinja": "{{ 'rag' }}"},
  )
  for number, (settings, files, expected) in enumerate(
    [
      (config["tokenizer_config"], {}, "config"),
      (config["tokenizer_config"], processor, "config"),
      (config["tokenizer_config"], jinja | processor | extra, "jinja"),
      (TOKENS, jinja | extra, "jinja"),
      (TOKENS | {"chat_template": named}, {}, "named"),
      (TOKENS | {"chat_template": named}, jinja, "jinja"),
      # Only processors read it in transformers; better than none.
      (TOKENS, processor, "json"),
    ]
  ):
    folder = folder_of(tmp_path / str(number), shared_data, settings, **files)
    tokenizer = tokenizers.load(folder)
    assert tokenizer.render(MESSAGES, add_generation_prompt=True) == expected
    given = tokenizers.load(folder, chat_template="{{ 'given' }}")
    assert given.render(MESSAGES, add_generation_prompt=True) == "given"
  (tmp_path / "0/tokenizer_config.json").unlink()
  (tmp_path / "0/chat_template.jinja").write_text("{{ 'bare' }}")
  tokenizer = tokenizers.load(str(tmp_path / "0"))
  assert tokenizer.render(MESSAGES, add_generation_prompt=True) == "bare"


def test_several_templates_of_which_none_is_the_default(tmp_path, shared_data):
  named = [{"name": "tool_use", "template": "{{ 'tools' }}"}]
  folder = folder_of(tmp_path, shared_data, TOKENS | {"chat_template": named})
  with pytest.raises(ValueError, match="None of the chat templates of"):
    tokenizers.load(folder).render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"tokenizer_config.json": '{"chat_template": 3}'}, "should be text, or"),
    ({"tokenizer_config.json": '{"chat_template": [3]}'}, "should be text, or"),
    ({"tokenizer_config.json": "{"}, "tokenizer_config.json of .* is no JSON"),
    ({"chat_template.json": "[]"}, "should hold a JSON object"),
  ],
)
def test_broken_files_of_a_folder_are_one_sentence(
  tmp_path, shared_data, files, message
):
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.load(folder_of(tmp_path, shared_data, **files))
  assert "\n" not in str(caught.value)


def test_today_is_always_the_same_day():
  # Else the tokens of a data set would be others tomorrow.
  template = """\
{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') -%}
{%- endif -%}
{%- macro today() -%}{{ strftime_now("%Y-%m-%d") }}{%- endmacro -%}
{{ date ~ ', ' ~ today() ~ strftime_now(' %A %B %H:%M') }}"""
  assert render(template) == "26 Jul 2024, 2024-07-26 Friday July 00:00"
  # What goes in front of such a template leaves no trace.
  assert render("  a\n{{ strftime_now('%y') }}\n") == "  a\n24"
  assert render("\n{# strftime_now #}a") == render("\n{# x #}a") == "\na"


def test_whatever_a_template_raises_is_one_sentence():
  for template, message in (
    ("{{ raise_exception('No system\nturn.') }}", "No system turn"),
    ("{{ messages[9].content }}", "has no"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages[0].content | int('a') / messages }}", "unsupported"),
    ("{% for %}", "Expected an expression"),
    ("{{ nothing + 'a' }}", "'nothing' is undefined"),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      render(template)
    assert str(caught.value).count(".") == 1 and "\n" not in str(caught.value)


def test_generation_blocks_are_scored_to_their_end(tmp_path, shared_data):
  template = """\
{%- for message in messages -%}
{{ '<' + message.role + '>' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ message.content + '</turn>' }}{%- endgeneration -%}
{%- else -%}{{ message.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"""
  folder = folder_of(
    tmp_path, shared_data, TOKENS | {"chat_template": template}
  )
  tokenizer = tokenizers.load(folder)
  example = preferences.Example(MESSAGES[1:2], "4", None)
  (encoded,) = tokenization.encode([example], tokenizer, add_bos=None)
  assert tokenizer.decode(encoded.prompt[1:]) == "<user>  2+2? <assistant>"
  assert encoded.chosen[-1] == tokenizer.eos_id
  assert tokenizer.decode(encoded.prompt[1:] + encoded.chosen[:-1]) == (
    "<user>  2+2? <assistant>4</turn>"
  )
