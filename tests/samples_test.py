"""From questions to pairs: sampled by a model, checked, and paired."""

import collections
import json

import pytest
import tiny_runs

from dpop_jax import answers, generate, samples, saved_config, train
from dpop_jax.data import pair_sets, question_sets, sampled_answers, sources

# Four ways to go on, which a model learns in some steps.
ROWS = [
  {"prompt": prompt, "completion": 2 * letter}
  for prompt in ("ab", "ba", "abc", "cab", "bb")
  for letter in "cegi"
]
QUESTIONS = [
  {"prompt": prompt, "expected": "ee"}
  for prompt in ("ab", "ba", "abc", "cab", "bb", "bab")
]
SAMPLING = generate.SamplingConfig(max_new_tokens=4, temperature=1.0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Of a model that goes on with cc or gg, and twice as often with ee or ii."""
  folder = tmp_path_factory.mktemp("trained")
  data = tiny_runs.write_data(folder)
  data["train"] = tuple(
    tiny_runs.write_rows(folder / f"{i}.jsonl", ROWS[i::2]) for i in range(2)
  )
  config = tiny_runs.make_config(
    data,
    loss__name="sft",
    run__num_steps=100,
    run__eval_every_steps=None,
    run__log_every_steps=100,
    checkpoints__save_every_steps=None,
    data__num_eval_pairs=0,
    # A mixture, to see one trained on.
    data__weights=(1.0, 2.0),
    batch__rows_per_microbatch=8,
    model__num_hidden_layers=1,
    mesh__data=8,
    mesh__fsdp=1,
    mesh__tensor=1,
    optimizer__peak_learning_rate=2e-2,
  )
  train.train(config, str(folder / "run"))
  return str(folder / "run")


def sample(folder, rows, model, out, answerer=None, **changes):
  questions = question_sets.load(
    question_sets.QuestionConfig(
      kind="plain",
      source=tiny_runs.write_rows(folder / "questions.jsonl", rows),
    )
  )
  options = dict(num_samples=16, questions_per_file=2) | changes
  return samples.sample(
    answerer or (lambda: answers.Answerer(saved_config.load(model), model)),
    questions,
    SAMPLING,
    samples.SamplesConfig(**options),
    model=model,
    out=str(out),
  )


def files(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read(folder):
  return [
    row.value
    for file in sources.resolve(str(folder))
    for row in sources.read(file)
  ]


def test_answers_are_sampled_checked_and_paired(workdir, tmp_path):
  out = tmp_path / "answers"
  manifest = sample(tmp_path, QUESTIONS, workdir, out)
  assert manifest["num_questions"] == 6
  names = [f"answers-{i:05}-of-00003.jsonl" for i in range(3)]
  assert list(files(out)) == [*names, "manifest.json"]
  rows = read(out)
  assert {row["prompt"] for row in rows} == {q["prompt"] for q in QUESTIONS}
  counts = collections.Counter(a for row in rows for a in row["answers"])
  # Most of 96 samples are what was learned, those of the second file more.
  assert counts.total() == 96
  learned = [counts[2 * letter] for letter in "cgei"]
  assert sum(learned) > 38 and sum(learned[2:]) > sum(learned[:2])

  # A file that is missing is made again, to the byte; the others stay.
  before = files(out)
  (out / names[1]).unlink()
  sample(tmp_path, QUESTIONS[::-1], workdir, out)
  assert files(out) == before
  # Nothing is missing, so that no model is read.
  sample(tmp_path, QUESTIONS, workdir, out, answerer=pytest.fail)
  assert files(out) == before
  with pytest.raises(ValueError, match="otherwise: samples differ"):
    sample(tmp_path, QUESTIONS, workdir, out, seed=1)
  with pytest.raises(
    ValueError, match="otherwise: num_questions, questions_sha256"
  ):
    sample(tmp_path, QUESTIONS[:2], workdir, out)

  pairs = tmp_path / "pairs"
  built = pair_sets.build(
    pair_sets.BuildConfig(
      kind="sampled",
      source=str(out),
      out=str(pairs),
      sampled=sampled_answers.SampledConfig(checker="exact", max_pairs=3),
    )
  )
  sizes = collections.Counter()
  for pair in read(pairs):
    (row,) = (row for row in rows if row["prompt"] == pair["prompt"])
    assert pair["chosen"] == "ee" and pair["rejected"] in row["answers"]
    assert pair["rejected"] != "ee"
    sizes[pair["prompt"]] += 1
  assert built["num_pairs"] == sizes.total()
  assert len(sizes) >= 3 and max(sizes.values()) == 3


def test_a_hugging_face_folder_is_run_as_its_config_says(shared_data):
  folder = str(shared_data / "models/stories260K")
  config = answers.config_of(folder, dtype="bfloat16")
  assert config.data.tokenizer == config.run.init_from == folder
  assert (config.model.vocab_size, config.model.hidden_size) == (512, 64)
  assert config.model.param_dtype == config.model.dtype == "bfloat16"


def test_several_greedy_samples_are_refused(tmp_path):
  questions = question_sets.QuestionSet([], {})
  greedy = generate.SamplingConfig(max_new_tokens=4)
  with pytest.raises(ValueError, match="would all be the same"):
    samples.sample(
      lambda: answers.Answerer(None, ""),
      questions,
      greedy,
      samples.SamplesConfig(),
      model="",
      out="x",
    )


def questions_of(folder, kind, rows, **changes):
  path = tiny_runs.write_rows(folder / "rows.jsonl", rows)
  config = question_sets.QuestionConfig(kind=kind, source=path, **changes)
  return question_sets.load(config).questions


def test_questions_of_each_layout(tmp_path):
  sums = [
    {"question": f"{i}+1+1?", "answer": f"{i}+1 = {i + 1}\n#### {i + 2}"}
    for i in range(3)
  ]
  for question in questions_of(tmp_path, "maths", sums, num_shots=2):
    first = int(question.prompt.split("Question: ")[-1][0])
    assert question.expected == str(first + 2)
    assert question.prompt.count("Question: ") == 3
    assert question.prompt.endswith("+1+1?\nAnswer:\n")
  choices = {
    "question": "Which?",
    "choices": {"text": ["x", "y"], "label": ["A", "B"]},
    "answerKey": "B",
  }
  (question,) = questions_of(tmp_path, "arc", [choices], format="chat")
  assert question.expected == "B"
  assert question.prompt == [{"role": "user", "content": "Which?\nA. x\nB. y"}]
  assert len(questions_of(tmp_path, "maths", sums, num_questions=2)) == 2
  with pytest.raises(ValueError, match="none of its 1 rows.*should be an ans"):
    questions_of(tmp_path, "plain", [{"prompt": "a"}])
  with pytest.raises(ValueError, match="of no use with kind='plain'"):
    questions_of(tmp_path, "plain", QUESTIONS, num_shots=1)


def pairs_of(rows, tmp_path, checker="number", **changes):
  source = tiny_runs.write_rows(tmp_path / "answers.jsonl", rows)
  manifest = pair_sets.build(
    pair_sets.BuildConfig(
      kind="sampled",
      source=source,
      out=str(tmp_path / "out"),
      sampled=sampled_answers.SampledConfig(checker=checker, **changes),
    )
  )
  return read(tmp_path / "out"), manifest["skipped"]


SUM = {
  "prompt": "2+2?",
  "expected": "4",
  "answers": [
    "#### 4", "So it is 4.\n#### 4", "#### 4", "#### 5", "Well.\n#### 6", "Four"
  ],
}  # fmt: skip


def test_every_right_answer_meets_every_wrong_one_at_most(tmp_path):
  pairs, skipped = pairs_of([SUM], tmp_path, max_pairs=10)
  assert {(p["chosen"], p["rejected"]) for p in pairs} == {
    (right, wrong)
    for right in ("#### 4", "So it is 4.\n#### 4")
    for wrong in ("#### 5", "Well.\n#### 6")
  }
  assert len(pairs) == 4
  assert skipped == {"answer_without_a_result": 1, "answer_repeated": 1}
  # No answer is used twice before the others.
  pairs, _ = pairs_of([SUM], tmp_path, max_pairs=2)
  assert len({p["chosen"] for p in pairs}) == 2
  assert len({p["rejected"] for p in pairs}) == 2
  assert pairs == pairs_of([SUM], tmp_path, max_pairs=2)[0]


def test_answers_of_similar_length_may_go_first(tmp_path):
  pairs, _ = pairs_of([SUM], tmp_path, max_pairs=1, pairing="closest_length")
  assert [(p["chosen"], p["rejected"]) for p in pairs] == [("#### 4", "#### 5")]


def test_answers_without_a_result_may_count_as_wrong(tmp_path):
  pairs, skipped = pairs_of([SUM], tmp_path, max_pairs=10, no_result="wrong")
  assert "Four" in {p["rejected"] for p in pairs}
  assert skipped == {"answer_repeated": 1}


def test_long_answers_may_be_left_out(tmp_path):
  pairs, skipped = pairs_of([SUM], tmp_path, max_characters=6)
  assert [(p["chosen"], p["rejected"]) for p in pairs] == [("#### 4", "#### 5")]
  assert skipped["answer_too_long"] == 2


def test_rows_of_one_prompt_belong_together_wherever_they_stand(tmp_path):
  rows = [SUM | {"answers": [answer]} for answer in SUM["answers"]]
  other = {"prompt": "1+1?", "expected": 2, "answer": "#### 2"}
  pairs, skipped = pairs_of([rows[4], other, *rows[:4]], tmp_path, max_pairs=9)
  assert len(pairs) == 4 and skipped["all_answers_right"] == 1
  chat = [{"role": "user", "content": "2+2?"}]
  pairs, _ = pairs_of([SUM | {"prompt": chat}], tmp_path, max_pairs=1)
  assert pairs[0]["prompt"] == chat
  assert pairs[0]["chosen"][0]["role"] == "assistant"


@pytest.mark.parametrize(
  "changes, what",
  [
    ({"expected": "none"}, "is none to the checker"),
    ({"expected": None}, "`expected` should be the right answer"),
    ({"prompt": ""}, "`prompt` should be text or messages"),
    ({"answers": [1]}, "a text `answer` or a list"),
  ],
)
def test_bad_rows_of_answers_are_named(changes, what, tmp_path):
  with pytest.raises(ValueError, match=f"row 1 cannot be used: .*{what}"):
    pairs_of([SUM | changes], tmp_path, checker="letter")


def test_contradicting_rows_are_counted(tmp_path):
  pairs, skipped = pairs_of([SUM, SUM | {"expected": "5"}], tmp_path)
  assert len(pairs) == 4 and skipped["bad_row"] == 1
  assert json.dumps(skipped)
