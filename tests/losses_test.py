import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from dpop_jax import losses

# Log-ratios (chosen, rejected) are (1, -1) and (-2, -3).
LOGPS = dict(
  policy_chosen_logps=jnp.array([-4.0, -7.0]),
  policy_rejected_logps=jnp.array([-7.0, -9.0]),
  reference_chosen_logps=jnp.array([-5.0, -5.0]),
  reference_rejected_logps=jnp.array([-6.0, -6.0]),
)
POLICY_LOGPS = dict(list(LOGPS.items())[:2])
LENGTHS = dict(
  chosen_lengths=jnp.array([2, 4]), rejected_lengths=jnp.array([5, 1])
)

# Every loss with its inputs and some hyper-parameters.
CASES = {
  "dpop": (losses.dpop_loss, LOGPS, dict(beta=0.5, dpop_lambda=3.0)),
  "dpo": (losses.dpo_loss, LOGPS, dict(beta=0.5)),
  "conservative_dpo": (
    losses.conservative_dpo_loss,
    LOGPS,
    dict(beta=0.5, label_smoothing=0.1),
  ),
  "ipo": (losses.ipo_loss, LOGPS, dict(beta=0.5)),
  "length_normalised_ipo": (
    losses.length_normalised_ipo_loss,
    LOGPS | LENGTHS,
    dict(beta=0.5),
  ),
  "slic_hinge": (losses.slic_hinge_loss, LOGPS, dict(beta=0.25)),
  "slic_likelihood": (
    losses.slic_likelihood_loss,
    POLICY_LOGPS,
    dict(delta=4.0, likelihood_weight=0.1),
  ),
  "sft": (
    losses.sft_loss,
    dict(policy_chosen_logps=LOGPS["policy_chosen_logps"]),
    {},
  ),
}
# Margins r_w - r_l are 2 and 1; DPOP's are 2 - 3 * 0 = 2 and 1 - 3 * 2 = -5.
EXPECTED = {
  "dpop": [math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.5))],
  "dpo": [math.log1p(math.exp(-1.0)), math.log1p(math.exp(-0.5))],
  "conservative_dpo": [
    0.9 * math.log1p(math.exp(-1.0)) + 0.1 * math.log1p(math.exp(1.0)),
    0.9 * math.log1p(math.exp(-0.5)) + 0.1 * math.log1p(math.exp(0.5)),
  ],
  # The margin aimed at is 1 / (2 * 0.5) = 1.
  "ipo": [1.0, 0.0],
  # Per token (1/2, -1/5) and (-2/4, -3/1): margins 0.7 and 2.5.
  "length_normalised_ipo": [(0.7 - 1.0) ** 2, (2.5 - 1.0) ** 2],
  "slic_hinge": [0.5, 0.75],
  # 4 + 4 - 7 = 1 and 4 + 7 - 9 = 2, and a tenth of 4 and 7.
  "slic_likelihood": [1.4, 2.7],
  "sft": [4.0, 7.0],
}
with_reference = pytest.mark.parametrize(
  "name", [name for name in CASES if CASES[name][1].keys() >= LOGPS.keys()]
)
all_losses = pytest.mark.parametrize("name", CASES)


def as_is(function):
  return function


def dpop_gradients(logps, **hyper_parameters):
  total = lambda *logps: losses.dpop_loss(*logps, **hyper_parameters).sum()
  return jax.grad(total, argnums=(0, 1))(*logps)


@pytest.mark.parametrize(
  "transform", [as_is, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
@all_losses
def test_hand_worked_pairs(name, transform):
  loss, inputs, hyper_parameters = CASES[name]
  compute = transform(lambda inputs: loss(**inputs, **hyper_parameters))
  np.testing.assert_allclose(compute(inputs), EXPECTED[name], rtol=2e-6)


@all_losses
def test_rows_of_pairs_are_as_good_as_pairs(name):
  loss, inputs, hyper_parameters = CASES[name]
  rows = jax.tree.map(lambda x: jnp.stack([x, x[::-1], x]), inputs)
  expected = np.array(EXPECTED[name])
  np.testing.assert_allclose(
    loss(**rows, **hyper_parameters),
    [expected, expected[::-1], expected],
    rtol=2e-6,
  )


@all_losses
def test_docstring_equation_is_what_the_code_computes(name):
  loss, inputs, hyper_parameters = CASES[name]
  # The equation is the first indented block after the summary line.
  equation = re.search(r"\n\n((?: {4}\S.*\n)+)\n", loss.__doc__).group(1)
  equation = " ".join(equation.split())
  for pair in range(2):
    names = dict(
      hyper_parameters,
      log=math.log,
      sigmoid=lambda x: 1.0 / (1.0 + math.exp(-x)),
      max=max,
      logp_w=-4.0 if pair == 0 else -7.0,
      logp_l=-7.0 if pair == 0 else -9.0,
      r_w=1.0 if pair == 0 else -2.0,
      r_l=-1.0 if pair == 0 else -3.0,
      chosen_length=2 if pair == 0 else 4,
      rejected_length=5 if pair == 0 else 1,
      __builtins__={},
    )
    np.testing.assert_allclose(
      loss(**inputs, **hyper_parameters)[pair],
      eval(equation, names),
      rtol=2e-6,
    )


@all_losses
def test_gradients_match_finite_differences(name):
  loss, inputs, hyper_parameters = CASES[name]
  logps = {key: x for key, x in inputs.items() if key.endswith("logps")}
  rest = {key: x for key, x in inputs.items() if key not in logps}
  # No pair is within eps of a kink. Truncation is of order eps**2 = 1e-4 and
  # float32 rounding of order 1e-6 / eps = 1e-4.
  jax.test_util.check_grads(
    # Under jit, as the finite differences come in as NumPy arrays.
    jax.jit(lambda logps: loss(**logps, **rest, **hyper_parameters)),
    (logps,),
    order=1,
    modes=["rev"],
    eps=1e-2,
    atol=1e-3,
    rtol=1e-3,
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@all_losses
def test_results_are_float32_and_computed_in_float32(name, dtype):
  loss, inputs, hyper_parameters = CASES[name]
  low = jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    inputs,
  )
  result = loss(**low, **hyper_parameters)
  assert result.dtype == jnp.float32
  # The inputs are small whole numbers, exact in every one of these types.
  np.testing.assert_array_equal(result, loss(**inputs, **hyper_parameters))


# pi_w, pi_l, ref_w, ref_l, beta, lambda: loss, d/d pi_w, d/d pi_l. Computed in
# float64 from the paper's second version. Only -10.1 is inexact in float32:
# 5e-7 off, times beta * (1 + lambda) = 15.3 that is 7e-6 in the sigmoid's
# argument.
GOLDEN = [
  ((-9, -13, -10, -12, 0.3, 50), 0.4374879505, -0.1063031081, 0.1063031081),
  (
    (-10.1, -20, -10, -12, 0.3, 50),
    0.3499182533,
    -4.5173908206,
    0.0885762906,
  ),
  ((-11, -40, -10, -12, 0.3, 50), 6.9010072780, -15.2845964065, 0.2996979688),
  ((-11, -40, -10, -12, 0.3, 5), 0.0013594436, -0.0024453359, 0.0004075560),
  (
    (-10.5, -15, -10, -12, 0.1, 10),
    0.8259394199,
    -0.6183941510,
    0.0562176501,
  ),
  ((-10.5, -15, -10, -12, 0.3, 0), 0.3868710061, -0.0962463902, 0.0962463902),
]


@pytest.mark.parametrize(
  "numbers, loss, chosen_gradient, rejected_gradient", GOLDEN
)
def test_dpop_golden_vectors(numbers, loss, chosen_gradient, rejected_gradient):
  *logps, beta, dpop_lambda = map(float, numbers)
  logps = [jnp.array([x]) for x in logps]
  hyper_parameters = dict(beta=beta, dpop_lambda=dpop_lambda)
  np.testing.assert_allclose(
    losses.dpop_loss(*logps, **hyper_parameters), [loss], rtol=2e-5
  )
  np.testing.assert_allclose(
    dpop_gradients(logps, **hyper_parameters),
    [[chosen_gradient], [rejected_gradient]],
    rtol=2e-5,
  )


def penalty_outside_the_sigmoid(r_w, r_l, beta, dpop_lambda):
  penalty = max(0.0, -r_w)
  return math.log1p(math.exp(-beta * (r_w - r_l))) + dpop_lambda * penalty


def lambda_not_times_beta(r_w, r_l, beta, dpop_lambda):
  penalty = max(0.0, -r_w)
  return math.log1p(math.exp(-(beta * (r_w - r_l) - dpop_lambda * penalty)))


def flipped_sign(r_w, r_l, beta, dpop_lambda):
  penalty = max(0.0, -r_w)
  return math.log1p(math.exp(-beta * (r_w - r_l + dpop_lambda * penalty)))


def penalty_of_the_wrong_sign_of_log_ratio(r_w, r_l, beta, dpop_lambda):
  penalty = max(0.0, r_w)
  return math.log1p(math.exp(-beta * (r_w - r_l - dpop_lambda * penalty)))


@pytest.mark.parametrize(
  "variant, its_loss",
  [
    # Row 3 of the golden vectors: r_w = -1, r_l = -28, penalty 1, margin 27.
    (penalty_outside_the_sigmoid, 50.000303),
    (lambda_not_times_beta, 41.9),
    (flipped_sign, math.log1p(math.exp(-0.3 * 77))),
    (penalty_of_the_wrong_sign_of_log_ratio, math.log1p(math.exp(-0.3 * 27))),
  ],
)
def test_dpop_is_none_of_the_wrong_public_variants(variant, its_loss):
  logps = [jnp.array([x]) for x in (-11.0, -40.0, -10.0, -12.0)]
  wrong = variant(-1.0, -28.0, 0.3, 50.0)
  assert wrong == pytest.approx(its_loss, rel=1e-6)
  right = losses.dpop_loss(*logps, beta=0.3, dpop_lambda=50.0)[0]
  assert right == pytest.approx(6.9010072780, rel=1e-5)
  assert abs(wrong - right) > 6.0


def test_dpop_without_penalty_is_dpo():
  np.testing.assert_array_equal(
    losses.dpop_loss(**LOGPS, beta=0.3, dpop_lambda=0.0),
    losses.dpo_loss(**LOGPS, beta=0.3),
  )


def test_dpop_is_dpo_while_the_chosen_answer_is_likelier_than_before():
  logps = [jnp.array([x]) for x in (-9.0, -13.0, -10.0, -12.0)]
  np.testing.assert_array_equal(
    losses.dpop_loss(*logps, beta=0.3, dpop_lambda=50.0),
    losses.dpo_loss(*logps, beta=0.3),
  )
  dpo = lambda chosen: losses.dpo_loss(chosen, *logps[1:], beta=0.3).sum()
  np.testing.assert_array_equal(
    dpop_gradients(logps, beta=0.3, dpop_lambda=50.0)[0],
    jax.grad(dpo)(logps[0]),
  )


def test_dpop_pulls_the_chosen_answer_51_times_as_hard_as_the_rejected():
  logps = [jnp.array([x]) for x in (-10.5, -15.0, -10.0, -12.0)]
  chosen, rejected = dpop_gradients(logps, beta=0.3, dpop_lambda=50.0)
  np.testing.assert_allclose(chosen / rejected, [-51.0], rtol=1e-6)


@pytest.mark.parametrize("transform", [as_is, jax.jit], ids=["eager", "jit"])
def test_first_dpop_gradient_is_that_of_dpo(transform):
  chosen, rejected = jnp.array([-10.1]), jnp.array([-12.3])

  def chosen_gradient(penalty):
    def total(policy_chosen):
      r_w, r_l = policy_chosen - chosen, jnp.zeros_like(rejected)
      return -jax.nn.log_sigmoid(0.3 * (r_w - r_l - 50.0 * penalty(-r_w))).sum()

    return transform(jax.grad(total))(chosen)

  # beta * sigmoid(0) = 0.3 / 2, and with half the penalty's 0.3 / 2 * 26.
  np.testing.assert_allclose(
    chosen_gradient(lambda x: jnp.maximum(0.0, x)), [-3.9], rtol=1e-6
  )
  gradients = transform(
    lambda chosen, rejected: dpop_gradients(
      (chosen, rejected, chosen, rejected), beta=0.3, dpop_lambda=50.0
    )
  )(chosen, rejected)
  np.testing.assert_allclose(gradients, [[-0.15], [0.15]], rtol=1e-6)


@pytest.mark.parametrize(
  "name, expected",
  [
    ("dpop", math.log(2.0)),
    ("dpo", math.log(2.0)),
    ("conservative_dpo", math.log(2.0)),
    ("ipo", 1.0),
    ("length_normalised_ipo", 1.0),
    ("slic_hinge", 1.0),
  ],
)
def test_loss_where_policy_equals_reference(name, expected):
  loss, inputs, hyper_parameters = CASES[name]
  inputs = inputs | dict(
    policy_chosen_logps=inputs["reference_chosen_logps"],
    policy_rejected_logps=inputs["reference_rejected_logps"],
  )
  np.testing.assert_allclose(
    loss(**inputs, **hyper_parameters), [expected] * 2, rtol=1e-6
  )


def test_conservative_dpo_without_smoothing_is_dpo():
  np.testing.assert_array_equal(
    losses.conservative_dpo_loss(**LOGPS, beta=0.3, label_smoothing=0.0),
    losses.dpo_loss(**LOGPS, beta=0.3),
  )


def test_conservative_dpo_is_smallest_at_a_finite_margin():
  # sigmoid(0.5 * margin) = 0.9 at margin = 2 * log(9).
  zero = jnp.zeros(1)
  gradient = jax.grad(
    lambda chosen: losses.conservative_dpo_loss(
      chosen, zero, zero, zero, beta=0.5, label_smoothing=0.1
    ).sum()
  )
  at_minimum = jnp.array([2.0 * math.log(9.0)])
  np.testing.assert_allclose(gradient(at_minimum), [0.0], atol=1e-7)
  assert gradient(at_minimum - 0.1)[0] < 0 < gradient(at_minimum + 0.1)[0]


def test_ipo_is_zero_at_its_margin_and_symmetric_about_it():
  zero = jnp.zeros(3)
  chosen = jnp.array([2.0, 2.5, 3.0])
  # 1 / (2 * 0.2) = 2.5.
  np.testing.assert_allclose(
    losses.ipo_loss(chosen, zero, zero, zero, beta=0.2),
    [0.25, 0.0, 0.25],
    atol=1e-6,
  )


def test_length_normalised_ipo_of_one_token_answers_is_ipo():
  ones = jnp.array([1, 1])
  np.testing.assert_array_equal(
    losses.length_normalised_ipo_loss(
      **LOGPS, chosen_lengths=ones, rejected_lengths=ones, beta=0.3
    ),
    losses.ipo_loss(**LOGPS, beta=0.3),
  )


def test_length_normalised_ipo_of_padding_is_finite_with_its_gradient():
  zero, none = jnp.zeros(1), jnp.array([0])
  value, gradient = jax.value_and_grad(
    lambda chosen: losses.length_normalised_ipo_loss(
      chosen, zero, zero, zero, none, none, beta=0.5
    ).sum()
  )(zero)
  assert value == 1.0
  assert np.isfinite(gradient).all()


def test_slic_hinge_follows_dpo_where_pairs_are_far_on_the_wrong_side():
  # -log sigmoid(z) tends to -z, and the hinge is 1 - z.
  logps = [jnp.array([x]) for x in (-90.0, -10.0, -10.0, -50.0)]
  np.testing.assert_allclose(
    losses.slic_hinge_loss(*logps, beta=0.5),
    1.0 + losses.dpo_loss(*logps, beta=0.5),
    rtol=1e-6,
  )


def test_slic_likelihood_without_likelihood_is_a_hinge_without_reference():
  zero = jnp.zeros(2)
  np.testing.assert_allclose(
    losses.slic_likelihood_loss(
      **POLICY_LOGPS, delta=4.0, likelihood_weight=0.0
    ),
    4.0
    * losses.slic_hinge_loss(
      **POLICY_LOGPS,
      reference_chosen_logps=zero,
      reference_rejected_logps=zero,
      beta=1.0 / 4.0,
    ),
    rtol=1e-6,
  )


def test_slic_likelihood_of_well_ranked_pairs_is_weighted_sft():
  chosen, rejected = jnp.array([-4.0]), jnp.array([-40.0])
  np.testing.assert_allclose(
    losses.slic_likelihood_loss(
      chosen, rejected, delta=1.0, likelihood_weight=0.1
    ),
    0.1 * losses.sft_loss(chosen),
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  "loss",
  [
    # Each pair is at margin 2 = 1 / beta = delta, on its hinge.
    lambda chosen, zero: losses.slic_hinge_loss(
      chosen, zero, zero, zero, beta=0.5
    ),
    lambda chosen, zero: losses.slic_likelihood_loss(
      chosen, zero, delta=2.0, likelihood_weight=0.0
    ),
  ],
  ids=["slic_hinge", "slic_likelihood"],
)
def test_gradient_on_the_hinge_is_zero(loss):
  gradient = jax.grad(lambda chosen: loss(chosen, jnp.zeros(1)).sum())
  np.testing.assert_array_equal(gradient(jnp.array([2.0])), [0.0])
  assert gradient(jnp.array([1.9]))[0] < 0


@pytest.mark.parametrize("chosen", [-1e4, -0.0])
@pytest.mark.parametrize("rejected", [-1e4, -0.0])
@all_losses
def test_extreme_log_probs_have_finite_losses_and_gradients(
  name, chosen, rejected
):
  loss, inputs, hyper_parameters = CASES[name]
  inputs = inputs | {
    key: jnp.full(2, chosen if "chosen" in key else rejected)
    for key in inputs
    if key.startswith("policy")
  }
  value, gradient = jax.value_and_grad(
    lambda chosen: loss(
      **inputs | dict(policy_chosen_logps=chosen), **hyper_parameters
    ).sum()
  )(inputs["policy_chosen_logps"])
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["dpop", "dpo", "slic_hinge"])
def test_impossible_rejected_answers_cost_nothing(name):
  loss, inputs, hyper_parameters = CASES[name]
  impossible = jnp.full(2, -jnp.inf)
  # Penalty off, as it would act on the chosen answer all the same.
  inputs = inputs | dict(
    policy_chosen_logps=inputs["reference_chosen_logps"] + 1.0
  )

  def total(chosen, rejected):
    policy = dict(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    return loss(**inputs | policy, **hyper_parameters).sum()

  value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
    inputs["policy_chosen_logps"], impossible
  )
  assert value == 0.0
  np.testing.assert_array_equal(gradients, np.zeros((2, 2)))


@pytest.mark.parametrize(
  "name, slope",
  # The sigmoid's argument is -inf, so the loss is linear in it.
  [("dpop", -0.5 * (1 + 3)), ("dpo", -0.5), ("slic_hinge", -0.25)],
)
def test_impossible_chosen_answers_are_pulled_with_a_finite_gradient(
  name, slope
):
  loss, inputs, hyper_parameters = CASES[name]
  value, gradient = jax.value_and_grad(
    lambda chosen: loss(
      **inputs | dict(policy_chosen_logps=chosen), **hyper_parameters
    ).sum()
  )(jnp.full(2, -jnp.inf))
  assert value == jnp.inf
  np.testing.assert_allclose(gradient, [slope] * 2, rtol=1e-6)


@with_reference
def test_losses_need_only_log_ratios(name):
  loss, inputs, hyper_parameters = CASES[name]
  shifted = {
    key: x - 8.0 if "chosen_logps" in key else x for key, x in inputs.items()
  }
  np.testing.assert_allclose(
    loss(**shifted, **hyper_parameters), EXPECTED[name], rtol=2e-6
  )


def test_losses_import_nothing_but_jax():
  heavy = {
    "datasets",
    "flax",
    "ml_collections",
    "optax",
    "orbax",
    "sentencepiece",
    "transformers",
  }
  program = (
    "import sys; from dpop_jax import losses; "
    f"print(sorted({heavy!r} & set(sys.modules)))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == "[]"
