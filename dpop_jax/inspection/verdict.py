"""What a report comes to, in sentences computed from its numbers."""

from collections.abc import Mapping
from typing import Any

from dpop_jax import report_text

# A pair in which DPO takes less than this off the probability of right tokens,
# all tokens together, has nothing to lose.
_SMALL_PUSH = 0.05
# Share of what DPO does to right tokens that pushes them down.
_HIGH_SHARE = 0.5
# Nats that a step of the output layer takes off other pairs' chosen answers;
# where models in docs/inspect_pairs.md lost a nat or two in 40 steps of DPO.
_LARGE_FALL = 0.5
_LOW_DISTANCE = 0.3
# The lambda to set turns round at least this much of the push.
_ENOUGH = 0.9
_PAPERS_LAMBDA = "50"


def of_model(condition: Mapping[str, Any]) -> dict[str, Any]:
  """The verdict on a set and a model.

  At risk is a set where DPO takes at least 0.05 off the probabilities of the
  right tokens of a pair, on average, and that is at least half of all it does
  to right tokens; or where a step of the output layer takes at least 0.5 nats
  off the chosen answers of other pairs.

  Args:
    condition: `condition.summary`, and `head_step_fall` (see `head_step.fall`).

  Returns:
    `is_at_risk`, `dpop_lambda` (what to set; None if no risk) and `sentence`.
  """
  down = condition["push_down_per_pair"].get("mean", 0.0)
  share = condition["share_of_push_down"]
  fall = condition["head_step_fall"]
  is_pushed = share is not None and down >= _SMALL_PUSH and share >= _HIGH_SHARE
  falls = fall is not None and fall >= _LARGE_FALL
  if not condition["num_tokens"] or share is None:
    facts = "behind the edit no token stands in both answers"
    is_pushed = False
  else:
    facts = (
      f"of the tokens behind the edit that both answers share "
      f"({_number(condition['tokens_per_pair'])} a pair), DPO pushes "
      f"{_percent(condition['share_of_tokens_pushed_down'])} down, by "
      f"{_number(down)} of probability a pair in all, which is "
      f"{_percent(share)} of what it does to right tokens"
    )
  if fall is not None:
    what = f"takes {_number(fall)} nats off"
    if fall < 0:
      what = f"adds {_number(-fall)} nats to"
    facts += (
      f"; a large step of the output layer along DPO's gradient {what} the "
      "chosen answers of other pairs"
    )
  if not is_pushed and not falls:
    return {
      "is_at_risk": False,
      "dpop_lambda": None,
      "sentence": f"Little risk of the paper's failure: {facts}. Plain DPO may "
      "do; watch logratios/chosen all the same.",
    }
  turned = condition["share_of_push_turned_round"]
  if not is_pushed:
    return {
      "is_at_risk": True,
      "dpop_lambda": float(_PAPERS_LAMBDA),
      "sentence": "At risk of losing chosen answers, if not by the paper's "
      f'condition: {facts}. Train with loss.name="dpop" and '
      f"loss.dpop_lambda={_PAPERS_LAMBDA}, whose penalty acts on what has "
      "become less likely for whatever reason.",
    }
  name = _lambda(turned)
  return {
    "is_at_risk": True,
    "dpop_lambda": float(name),
    "sentence": f"At risk of the paper's failure: {facts}. Train with "
    f'loss.name="dpop" and loss.dpop_lambda={name}, which turns round '
    f"{_percent(turned[name])} of that push while the penalty acts"
    + ("." if turned[name] >= _ENOUGH else "; the rest is of tokens that the "
      "model is certain of, on which the penalty acts as soon as they are less "
      "so."),
  }  # fmt: skip


def without_model(report: Mapping[str, Any]) -> dict[str, Any]:
  """What can be said of a set alone.

  Args:
    report: With its sections `edit_distance` and `first_difference`.
  """
  distance = report["edit_distance"]["tokens"]["median"]
  first = report["first_difference"]["relative_position"]["median"]
  common_end = report["first_difference"]["common_end_tokens"]["median"]
  facts = (
    f"the answers of a pair differ in {_percent(distance)} of their tokens "
    f"(median), first after {_percent(first)} of the chosen answer, and end "
    f"with {common_end:.0f} token{'' if common_end == 1 else 's'} in common"
  )
  if distance < _LOW_DISTANCE and common_end > 1:
    sentence = (
      f"Of the kind that DPO fails on in the paper: {facts}. Whether a model "
      "is at risk takes a forward pass: give it as --model."
    )
  else:
    sentence = (
      f"Not of the kind that DPO fails on in the paper: {facts}. A forward "
      "pass says more: give a model as --model."
    )
  return {"is_at_risk": None, "dpop_lambda": None, "sentence": sentence}


def _lambda(turned: Mapping[str, float]) -> str:
  """The paper's lambda if it is enough, else the least that is, else the most.

  The authors found results to depend little on lambda from 5 to 500.
  """
  if turned[_PAPERS_LAMBDA] >= _ENOUGH:
    return _PAPERS_LAMBDA
  largest = max(turned, key=float)
  gain = turned[largest] - turned[_PAPERS_LAMBDA]
  return largest if gain > 0.1 else _PAPERS_LAMBDA


_number, _percent = report_text.number, report_text.percent
