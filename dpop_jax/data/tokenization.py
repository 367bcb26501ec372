"""From text to token pairs: the one rule, and what happens to what is too long.

The rule: prompt and answers are encoded apart and their ids concatenated.

    text    "2 + 2"          " = 4"     (the other answer: " = 5")
    ids     <s> 2 + 2        = 4 </s>
            prompt           answer

  * Both answers follow the very same prompt ids, whatever the tokenizer would
    have merged across the seam.
  * One BOS, in front of the prompt, if the tokenizer begins sequences with one
    or `data.add_bos` says so; none is added where the prompt's text begins with
    it.
  * One EOS behind each answer, scored like the rest of it; none is added where
    the answer ends with it.
  * An answer is encoded as the continuation of a text: tokenizers that put a
    space in front of whatever they encode (Llama's) do so for the prompt only,
    so that prompt and answer decode to the text that was given.
  * Of messages, the prompt is what the chat template writes for them with its
    generation prompt, and an answer what it writes beyond that for the
    assistant's turn, the template's own end of the turn included. White space
    that a template puts behind a final EOS is left out.
  * Data that comes as ids gets BOS and EOS by the same rule.

No mask is made from ids; where an answer begins and ends is known from lengths.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpop_jax import pairs
from dpop_jax.data import preferences, tokenizers

# Of the rule above and everything below; goes into the key of cached tokens.
VERSION = 2

DROP, TRUNCATE, RAISE = "drop", "truncate", "raise"
Example = preferences.Example
Ids = list[int]


class Encoded(NamedTuple):
  """Ids of an example, BOS and EOS in place, not yet cut to length.

  Attributes:
    prompt: Ids, at least one.
    chosen: Ids, EOS last.
    rejected: The same; empty for supervised data.
    has_bos: Whether the prompt begins with BOS.
  """

  prompt: Ids
  chosen: Ids
  rejected: Ids
  has_bos: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """How long a pair may be, in tokens.

  Attributes:
    row_length: For the prefix tree of the pair: the prompt, what the answers
      share, and what they do not.
    max_length: For the prompt and the longer answer; None for no such limit.
    max_answer_length: For an answer with its EOS; None for no such limit.
    on_long_answer: "drop" the pair, "truncate" the answer (which then ends
      without EOS), or "raise".
  """

  row_length: int
  max_length: int | None = None
  max_answer_length: int | None = None
  on_long_answer: str = DROP


class Fitted(NamedTuple):
  """A pair within the limits.

  Attributes:
    pair: Its ids.
    num_cut: Tokens that the prompt lost at its beginning.
    is_truncated: Whether an answer lost its end.
  """

  pair: pairs.TokenPair
  num_cut: int
  is_truncated: bool


class TooLong(ValueError):
  """An answer for which `data.on_long_answer` leaves no pair."""


def uses_bos(tokenizer: tokenizers.Tokenizer, add_bos: bool | None) -> bool:
  """Whether prompts begin with BOS; `add_bos` None is the tokenizer's habit.

  Raises:
    ValueError: If BOS is asked for and the tokenizer has none.
  """
  if add_bos and tokenizer.bos_id is None:
    raise ValueError(
      f"data.add_bos is True, but the tokenizer {tokenizer.name} has no BOS; "
      "name it in data.bos_token."
    )
  return tokenizer.adds_bos if add_bos is None else add_bos


def encode_prompt(
  prompt: str | Sequence[dict[str, str]],
  tokenizer: tokenizers.Tokenizer,
  *,
  add_bos: bool | None,
) -> Ids:
  """Ids of a prompt as in the data, for an answer to be generated.

  Args:
    prompt: Text, or messages for the chat template.
    tokenizer: The tokenizer.
    add_bos: `data.add_bos`.
  """
  if not isinstance(prompt, str):
    prompt = tokenizer.render(prompt, add_generation_prompt=True)
  return _begin(
    tokenizer.encode(prompt), tokenizer, uses_bos(tokenizer, add_bos)
  )


def encode(
  examples: Sequence[Example | preferences.BadRow],
  tokenizer: tokenizers.Tokenizer,
  *,
  add_bos: bool | None,
) -> list[Encoded | preferences.BadRow]:
  """Ids of examples by the rule above; for unusable ones, why they are.

  Args:
    examples: Any number, many at once are faster; a BadRow stays what it is.
    tokenizer: The tokenizer.
    add_bos: `data.add_bos`.
  """
  is_bos_used = uses_bos(tokenizer, add_bos)
  texts = [_attempt(_render, example, tokenizer) for example in examples]
  encoded = _encode_texts(texts, tokenizer)
  return [
    _attempt(_finish, example, tokenizer, is_bos_used) for example in encoded
  ]


def fit(encoded: Encoded, limits: Limits) -> Fitted:
  """Cuts a pair to length.

  The prompt loses its beginning, though not a BOS, nor its last token. Where
  that is not enough, an answer is too long.

  Raises:
    TooLong: If an answer does not fit and is not to be truncated.
    preferences.BadRow: If the answers are the same once truncated.
  """
  prompt, chosen, rejected, has_bos = encoded
  # One token must be left to predict the answer from, and BOS says little.
  shortest_prompt = min(len(prompt), 1 + has_bos)
  longest = _longest_answer(chosen, rejected, shortest_prompt, limits)
  is_truncated = max(len(chosen), len(rejected)) > longest
  if is_truncated:
    if limits.on_long_answer != TRUNCATE or longest < 1:
      raise TooLong(
        f"an answer of {max(len(chosen), len(rejected))} tokens does not fit, "
        f"where at most {longest} do"
      )
    chosen, rejected = chosen[:longest], rejected[:longest]
    if chosen == rejected:
      raise preferences.BadRow(
        "identical answers", f"the answers are the same in {longest} tokens"
      )
  room = limits.row_length - _tree_length(chosen, rejected)
  if limits.max_length is not None:
    room = min(room, limits.max_length - max(len(chosen), len(rejected)))
  num_cut = max(0, len(prompt) - room)
  if num_cut:
    prompt = prompt[:has_bos] + prompt[has_bos + num_cut :]
  pair = pairs.TokenPair(
    *(np.asarray(ids, np.int32) for ids in (prompt, chosen, rejected))
  )
  return Fitted(pair, num_cut, is_truncated)


def _attempt(function, first, *arguments):
  if isinstance(first, preferences.BadRow):
    return first
  try:
    return function(first, *arguments)
  except preferences.BadRow as problem:
    return problem


def _render(example, tokenizer):
  """An example with its messages written out as text."""
  if not example.is_chat:
    return example
  # Asked for here, so that it ends the run and not only this row.
  if tokenizer.chat_template is None:
    tokenizer.render(example.prompt, add_generation_prompt=True)
  try:
    prompt = tokenizer.render(example.prompt, add_generation_prompt=True)
    answers = [
      answer and _render_answer(example.prompt, prompt, answer, tokenizer)
      for answer in (example.chosen, example.rejected)
    ]
  except preferences.BadRow:
    raise
  except ValueError as error:
    raise preferences.BadRow("chat template", str(error)) from error
  return Example(prompt, *answers)


def _render_answer(messages, prompt, answer, tokenizer):
  turn = {"role": "assistant", "content": answer}
  text = tokenizer.render([*messages, turn], add_generation_prompt=False)
  if not text.startswith(prompt):
    raise preferences.BadRow(
      "chat template",
      f"the chat template of {tokenizer.name} writes the prompt in another way "
      "once the answer follows; set data.chat_template to one that does not",
    )
  answer = text[len(prompt) :]
  if answer.rstrip().endswith(tokenizer.eos_token):
    return answer.rstrip()
  return answer


def _encode_texts(examples, tokenizer):
  """Examples of text become examples of ids; BadRows stay what they are."""
  texts = [
    (i, example)
    for i, example in enumerate(examples)
    if isinstance(example, Example) and not example.is_tokenised
  ]
  prompts = tokenizer.encode_all([example.prompt for _, example in texts])
  answers = [
    (k, side, getattr(example, side))
    for k, (_, example) in enumerate(texts)
    for side in ("chosen", "rejected")
    if getattr(example, side) is not None
  ]
  # Behind an empty prompt an answer begins the text and continues nothing.
  first = [a for a in answers if not prompts[a[0]]]
  later = [a for a in answers if prompts[a[0]]]
  ids = {}
  for group, encode_group in (
    (first, tokenizer.encode_all),
    (later, tokenizer.encode_continuations),
  ):
    encoded = encode_group([text for _, _, text in group])
    for (k, side, _), answer in zip(group, encoded, strict=True):
      ids[k, side] = answer
  results = list(examples)
  for k, (i, _) in enumerate(texts):
    results[i] = Example(prompts[k], ids[k, "chosen"], ids.get((k, "rejected")))
  return results


def _finish(example, tokenizer, is_bos_used):
  """Adds BOS and EOS, and checks what only ids can tell."""
  prompt = _begin(example.prompt, tokenizer, is_bos_used)
  if not prompt:
    raise preferences.BadRow(
      "empty prompt", "there is no token to predict the answer from"
    )
  chosen = _end(example.chosen, tokenizer)
  rejected = []
  if example.rejected is not None:
    rejected = _end(example.rejected, tokenizer)
    if chosen == rejected:
      raise preferences.BadRow(
        "identical answers", "the answers are the same tokens"
      )
  for ids in (prompt, chosen, rejected):
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
      raise preferences.BadRow(
        "unknown id",
        f"ids should lie in [0, {tokenizer.vocab_size}), the vocabulary of "
        f"{tokenizer.name}",
      )
  return Encoded(prompt, chosen, rejected, prompt[0] == tokenizer.bos_id)


def _begin(prompt, tokenizer, is_bos_used):
  if is_bos_used and prompt[:1] != [tokenizer.bos_id]:
    return [tokenizer.bos_id, *prompt]
  return prompt


def _end(answer, tokenizer):
  if not answer or answer == [tokenizer.eos_id]:
    raise preferences.BadRow("empty answer", "an answer has no tokens but EOS")
  if answer[-1] == tokenizer.eos_id:
    return answer
  return [*answer, tokenizer.eos_id]


def _num_shared(chosen, rejected):
  shared = 0
  for a, b in zip(chosen, rejected, strict=False):
    if a != b:
      break
    shared += 1
  return shared


def _tree_length(chosen, rejected):
  return len(chosen) + len(rejected) - _num_shared(chosen, rejected)


def _longest_answer(chosen, rejected, shortest_prompt, limits):
  """Tokens that answers may have, so that they fit with the shortest prompt."""
  longest = max(len(chosen), len(rejected))
  if limits.max_answer_length is not None:
    longest = min(longest, limits.max_answer_length)
  if limits.max_length is not None:
    longest = min(longest, limits.max_length - shortest_prompt)
  shared = _num_shared(chosen, rejected)
  room = limits.row_length - shortest_prompt

  def tree_length(length):
    lengths = [min(length, len(answer)) for answer in (chosen, rejected)]
    return sum(lengths) - min(length, shared)

  while longest > 0 and tree_length(longest) > room:
    longest -= 1
  return longest
