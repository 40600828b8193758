"""The job file: whatever is wrong with it is one sentence that names the field (P4, P13); every number of a run is
declared in it and none is derived from data (P11); NaN, infinity and what is out of bounds never get further (P4)."""

from __future__ import annotations

import copy

import pydantic
import pytest
from product import DIGITS

from cluster.accounting.costs import step_cost
from cluster.accounting.mechanisms import DiscreteGaussian, PoissonSubsampledGaussian
from cluster.errors import UsageError
from training.config import Job
from training.jobfile import load, override, parse
from training.sections import LOSS_PARTS, Feature
from tuning.config import SweepJob

JOB = """
account: people
privacy: {epsilon: 3.0, delta: 1e-4, unit: person, units: 2000, max_records_per_unit: 2}
data:
  source: people.csv
  validation_fraction: 0.2
  features:
    age: {range: [0, 120]}
    colour: {categories: [red, green]}
  label: {column: label, categories: [no, yes]}
model: {kind: linear}
training: {steps: 80, block: 20, expected_batch_size: 200, noise_multiplier: 8.0}
evaluation: {on: validation, noise: 5.0}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def refused(call, *arguments):
    """The one sentence with which a call is refused."""
    with pytest.raises(UsageError) as raised:
        call(*arguments)
    said = str(raised.value)
    assert raised.value.exit_code == 2
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert "\n" not in said
    assert said.endswith((".", "?"))
    for trace in ("Traceback", "pydantic", "For further information", "type=", "Error"):
        assert trace not in said
    return said


def test_a_good_job_reads_as_it_is_written(file):
    job = load(Job, file)
    assert job.privacy.delta == 1e-4  # a number, though YAML 1.1 takes it for a word
    assert job.evaluation.on == "validation"  # a key, though YAML 1.1 takes `on` for true
    assert job.data.label.categories == ("no", "yes")  # words, though YAML 1.1 takes them for false and true
    assert job.training.optimizer.name == "sgd"  # a default
    assert job.accounts == ("people/train", "people/validation")
    assert job.data.width == 3


WRONG = {
    # what is written over the good job → the field that the sentence begins with, and a word of what it says
    "training.noise_multiplier=.nan": ("training.noise_multiplier", "finite"),
    "training.noise_multiplier=.inf": ("training.noise_multiplier", "finite"),
    "training.noise_multiplier=-.inf": ("training.noise_multiplier", "finite"),
    "training.noise_multiplier=-8": ("training.noise_multiplier", "greater"),
    "training.noise_multiplier=0": ("training.noise_multiplier", "greater"),
    "training.noise_multiplier=1e6": ("training.noise_multiplier", "less"),
    "training.noise_multiplier=much": ("training.noise_multiplier", "'much' was given"),
    "training.noise_multiplier=[8]": ("training.noise_multiplier", "number"),
    "training.noise_multiplier=": ("training.noise_multiplier", "None was given"),
    "training.max_grad_norm=.nan": ("training.max_grad_norm", "finite"),
    "training.max_grad_norm=0": ("training.max_grad_norm", "greater"),
    "training.steps=true": ("training.steps", "True was given"),
    "training.noise_multiplier=true": ("training.noise_multiplier", "True was given"),
    "training.max_grad_norm=True": ("training.max_grad_norm", "True was given"),
    "privacy.max_records_per_unit=true": ("privacy.max_records_per_unit", "True was given"),
    "training.steps=0": ("training.steps", "greater"),
    "training.steps=2.5": ("training.steps", "integer"),
    "training.steps=20000000": ("training.steps", "less"),
    "training.block=0": ("training.block", "greater"),
    "training.physical_batch_size=1": ("training.physical_batch_size", "max_records_per_unit = 2"),
    "training.expected_batch_size=1601": ("training.expected_batch_size", "1600 units"),
    "training.optimizer.learning_rate=.inf": ("training.optimizer.learning_rate", "finite"),
    "training.optimizer.learning_rate=-1": ("training.optimizer.learning_rate", "greater"),
    "training.optimizer.momentum=1": ("training.optimizer.momentum", "less"),
    "training.optimizer.name=lion": ("training.optimizer.name", "'sgd' or 'adam'"),
    "training.backend=jax": ("training.backend", "'torch'"),
    "privacy.epsilon=.nan": ("privacy.epsilon", "finite"),
    "privacy.epsilon=0": ("privacy.epsilon", "greater"),
    "privacy.epsilon=1000": ("privacy.epsilon", "less"),
    "privacy.delta=0": ("privacy.delta", "greater"),
    "privacy.delta=1": ("privacy.delta", "less"),
    "privacy.delta=5e-4": ("privacy.delta", "below 1/units = 0.0005"),  # exactly 1/units
    "privacy.delta=0.1": ("privacy.delta", "below 1/units"),
    "privacy.units=1": ("privacy.units", "greater"),
    "privacy.unit=row": ("privacy.max_records_per_unit", "unit is a row"),
    "privacy.max_records_per_unit=0": ("privacy.max_records_per_unit", "greater"),
    "data.validation_fraction=1.0": ("data.validation_fraction", "less"),
    "data.validation_fraction=0": ("data.validation_fraction", "greater"),
    "data.features.age.range=[3, 3]": ("data.features.age.range", "below"),
    "data.features.age.range=[0, .inf]": ("data.features.age.range.1", "finite"),
    "data.features.age.range=[.nan, 1]": ("data.features.age.range.0", "finite"),
    "data.features.age.range=[1]": ("data.features.age.range.1", "missing"),
    "data.features.age.categories=[a, b]": ("data.features.age", "either range"),
    "data.features.age={}": ("data.features.age", "either range"),
    "data.features.colour.categories=[red, red]": ("data.features.colour.categories", "once"),
    "data.features.colour.categories=[1, 2]": ("data.features.colour.categories.0", "string"),
    "data.label.categories=[no]": ("data.label.categories", "2"),
    "data.label={column: label}": ("data.label.categories", "missing"),
    "model.kind=transformer": ("model.kind", "'causal-lm'"),
    "model.hidden=0": ("model.hidden", "greater"),
    "evaluation.noise=0": ("evaluation.noise", "greater"),
    "evaluation.noise=.nan": ("evaluation.noise", "finite"),
    "evaluation.on=train": ("evaluation.on", "'validation'"),
    "account=a/b": ("account", "'a/b' was given"),
    "account=": ("account", "string"),
    "audit.canaries=3": ("audit.canaries", "0"),
    "release.target=adapter": ("release.target", "adapter needs model.lora"),
    "training.noise_multiplyer=8": ("training.noise_multiplyer", "unknown; did you mean noise_multiplier?"),
    "privacy.epsilom=3": ("privacy.epsilom", "did you mean epsilon?"),
    "training.optimizer.lr=3": ("training.optimizer.lr", "unknown; allowed here are name, learning_rate"),
    "trainin.steps=3": ("trainin", "did you mean training?"),
    "seed=3": ("seed", "unknown"),
    "training.seed=3": ("training.seed", "unknown"),
    "training.steps.x=3": ("training.steps.x", "steps is no section"),
    "training=80": ("training", "80 was given"),
    "training=": ("training", "None was given"),
}


@pytest.mark.parametrize("assignment", WRONG)
def test_a_wrong_value_is_one_sentence_that_begins_with_its_field(file, assignment):
    field, word = WRONG[assignment]
    said = refused(load, Job, file, [assignment])
    assert said.startswith(f"{field}: ")
    assert word in said


@pytest.mark.parametrize("section", ["account", "privacy", "data", "model"])
def test_a_missing_section_is_named(file, section):
    raw = load(Job, file).model_dump(mode="json")
    del raw[section]
    said = refused(parse, Job, raw)
    assert said.startswith(f"{section}: it is missing")
    assert "add it to the job file" in said


@pytest.mark.parametrize("field", ["epsilon", "delta", "units"])
def test_what_the_owner_must_say_has_no_default(file, field):
    raw = load(Job, file).model_dump(mode="json")
    del raw["privacy"][field]
    assert refused(parse, Job, raw).startswith(f"privacy.{field}: it is missing")


FILES = {
    "no YAML": ("a: [1\nb: }", "is not YAML at line"),
    "a tab": ("a:\n\tb: 1", "is not YAML at line 2"),
    "two documents": ("a: 1\n---\nb: 2", "is not YAML"),
    "a python object": ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
    "a list": ("- a\n- b", "holds no sections"),
    "a word": ("hello", "holds no sections"),
    "nothing": ("", "holds no sections"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_job_is_named(tmp_path, what):
    content, word = FILES[what]
    path = tmp_path / "job.yaml"
    path.write_text(content)
    said = refused(load, Job, path)
    assert said.startswith(f"JOB: {path} {word}")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert refused(load, Job, tmp_path / "none.yaml").startswith(f"JOB: {tmp_path}/none.yaml does not exist")
    (tmp_path / "latin.yaml").write_bytes(b"account: \xff")
    with pytest.raises(UsageError, match=r"^JOB: .*latin\.yaml cannot be read"):
        load(Job, tmp_path / "latin.yaml")
    with pytest.raises(UsageError, match=r"^JOB: .* cannot be read"):
        load(Job, tmp_path)


@pytest.mark.parametrize("assignment", ["training.steps", "", "training.steps:3"])
def test_an_override_without_an_equals_sign_is_refused(file, assignment):
    said = refused(load, Job, file, [assignment])
    assert said.startswith("override: ")
    assert "section.key=value" in said


def test_overrides_are_read_as_yaml_and_win(file):
    job = load(
        Job,
        file,
        [
            "training.noise_multiplier=1e1",
            "training.optimizer={name: adam, learning_rate: 1e-3}",
            "evaluation={on: validation, noise: 7}",
            "training.steps=9",
            "account=no",
            "data.source=a=b.csv",
        ],
    )
    assert job.training.noise_multiplier == 10.0
    assert (job.training.optimizer.name, job.training.optimizer.learning_rate) == ("adam", 1e-3)
    assert (job.evaluation.on, job.evaluation.noise) == ("validation", 7.0)
    assert job.training.steps == 9
    assert job.account == "no"
    assert job.data.source.endswith("/a=b.csv")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1e3", -1e3),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("80", 80),
        ("true", True),
        ("True", True),
        ("yes", "yes"),
        ("off", "off"),
        ("on", "on"),
        ("y", "y"),
        ("NaN", "NaN"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("~", None),
    ],
)
def test_scalars_are_yaml_1_2_s(file, written, read):
    """Shown by what pydantic was given: a field that takes nothing says what it got."""
    said = refused(load, Job, file, [f"training.backend={written}"])
    assert said.startswith(f"training.backend: {read!r} was given")


def test_a_relative_source_is_relative_to_the_job_file(file, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load(Job, file).data.source == str(file.parent / "people.csv")
    assert load(Job, file, ["data.source=/somewhere/else.csv"]).data.source == "/somewhere/else.csv"
    assert load(Job, file, ["data.source=sklearn:digits"]).data.source == "sklearn:digits"


def test_with_values_is_checked_again(file):
    job = load(Job, file)
    changed = job.with_values({"training.noise_multiplier": 4.0, "training.optimizer.learning_rate": 0.1})
    assert changed.training.noise_multiplier == 4.0
    assert changed.training.optimizer.learning_rate == 0.1
    assert job.training.noise_multiplier == 8.0
    assert changed.with_values({"training.noise_multiplier": 8.0, "training.optimizer.learning_rate": 1.0}) == job
    assert job.with_values({}) == job
    assert refused(job.with_values, {"training.steps": float("nan")}).startswith("training.steps: ")
    assert refused(job.with_values, {"training.nothing": 1}).startswith("training.nothing: this key is unknown")
    assert refused(job.with_values, {"training.expected_batch_size": 1601}).startswith("training.expected_batch_size")


def test_override_makes_sections_that_are_missing():
    raw = {"a": 1}
    assert override(copy.deepcopy(raw), {"b.c.d": 2}) == {"a": 1, "b": {"c": {"d": 2}}}
    assert refused(override, {"a": 1}, {"a.b": 2}).startswith("a.b: ")


def test_every_number_of_a_run_is_declared(file):
    """The source does not exist: sample_rate is expected_batch_size over the declared units of train."""
    job = load(Job, file)
    run = job.run()
    assert run.sample_rate == 200 / (2000 * 0.8)
    assert run.expected_batch_size == 200
    assert (run.noise_multiplier, run.max_grad_norm, run.steps, run.block) == (8.0, 1.0, 80, 20)
    assert (run.physical_batch_size, run.max_records_per_unit) == (256, 2)
    train, validation = job.charges()
    assert train.account == "people/train"
    assert train.mechanism == PoissonSubsampledGaussian(200 / 1600, 8.0)
    assert (train.steps, train.block) == (80, 20)
    assert validation.account == "people/validation"
    assert validation.mechanism == DiscreteGaussian(5.0, 2)
    assert (validation.steps, validation.block) == (1, 1)
    everyone = load(Job, file, ["training.expected_batch_size=1600"]).run()
    assert everyone.sample_rate == 1.0
    assert load(Job, file, ["training.steps=5"]).run().block == 5


def test_the_dataset_is_what_was_declared(file):
    dataset = load(Job, file).dataset(["ab"])
    assert (dataset.name, dataset.unit, dataset.units) == ("people", "person", 2000)
    assert (dataset.max_records_per_unit, dataset.validation_fraction, dataset.sources) == (2, 0.2, ("ab",))


def test_a_job_cannot_be_changed(file):
    job = load(Job, file)
    for section, field in ((job, "account"), (job.training, "noise_multiplier"), (job.privacy, "epsilon")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(section, field, 1)


def test_a_job_survives_being_written_and_read(file):
    job = load(Job, file)
    assert parse(Job, job.model_dump(mode="json")) == job
    assert Feature(range=(0, 1)).categories is None


def test_true_is_no_account(file):
    assert refused(load, Job, file, ["account=true"]).startswith("account: True was given")


def test_true_is_no_end_of_a_range(file):
    assert refused(load, Job, file, ["data.features.age.range=[true, 3]"]).startswith("data.features.age.range")


def test_a_sample_rate_out_of_bounds_names_a_field_of_the_job(file):
    said = refused(load, Job, file, ["privacy={epsilon: 3, delta: 1e-15, units: 1000000000000}"])
    assert said.startswith(("privacy.units: ", "training.expected_batch_size: "))


def test_too_little_evaluation_noise_for_a_unit_s_records_is_refused_with_the_job(file):
    said = refused(
        load, Job, file, ["privacy.max_records_per_unit=100", "evaluation.noise=5", "training.physical_batch_size=100"]
    )
    assert said.startswith("evaluation.noise: ")


def test_a_date_is_a_word(file):
    assert load(Job, file, ["account=2001-99-99"]).account == "2001-99-99"


def test_an_override_that_is_no_yaml_is_named(file):
    assert refused(load, Job, file, ["training.steps=[1"]).startswith(("override: ", "training.steps: "))


def test_a_key_that_is_written_twice_is_refused(file):
    file.write_text(JOB.replace("epsilon: 3.0,", "epsilon: 3.0, epsilon: 30.0,"))
    assert "epsilon" in refused(load, Job, file)


@pytest.mark.parametrize(("written", "read"), [("010", 10), ("1:30", "1:30")])
def test_integers_are_yaml_1_2_s(file, written, read):
    said = refused(load, Job, file, [f"training.backend={written}"])
    assert said.startswith(f"training.backend: {read!r} was given")


def test_an_unknown_key_of_a_feature_gets_a_hint(file):
    assert "did you mean range?" in refused(load, Job, file, ["data.features.age.rnge=[0, 1]"])


def test_an_unknown_home_folder_is_no_crash(file):
    assert refused(load, Job, file, ["data.source=~nobody-by-this-name/people.csv"]).startswith("data.source: '~nobody")


CRASHES = {
    "a column called as a field of Feature": "data.features={range: {rnge: [0, 1]}}",
    "a key that is a list": "data={? [a, b] : 1}",
    "a tag that its word does not fit": "account=!!int abc",
    "5,000 digits": "account=" + "9" * 5000,
    "2,000 brackets": "account=" + "[" * 2000,
    "a path with a null byte": 'data.source="a\\0b.csv"',
}


@pytest.mark.parametrize("what", CRASHES)
def test_what_no_job_holds_is_refused_all_the_same(file, what):
    assert refused(load, Job, file, [CRASHES[what]])


@pytest.mark.parametrize(
    ("groups", "word"),
    [
        ("{column: sex, categories: []}", "categories"),
        ("{column: sex, categories: [a, a]}", "each may be named once"),
        ("{column: sex, categories: [a, other]}", "other is the name of all others"),
        ("{categories: [a]}", "column: it is missing"),
    ],
)
def test_groups_are_declared(groups, word):
    with pytest.raises(UsageError, match=word):
        load(SweepJob, DIGITS, [f"evaluation.groups={groups}"])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["evaluation.on=public"], "evaluation.source: it is missing"),
        (["evaluation.source=public.csv"], "evaluation.source: it is read with on: public only"),
        (["evaluation.on=public", "evaluation.source=~nobody-here/x.csv"], "evaluation.source: '~nobody-here/x.csv'"),
        (["evaluation.metric=loss", "evaluation.loss_bound=0"], "evaluation.loss_bound"),
        (["evaluation.metric=loss", "evaluation.noise=101"], "evaluation.noise: 101 was given; .* 100 at most"),
        (["evaluation.metric=perplexity"], "evaluation.metric"),
    ],
)
def test_how_a_model_is_judged_is_declared(changes, word):
    with pytest.raises(UsageError, match=f"^{word}"):
        load(SweepJob, DIGITS, changes)


def test_what_is_judged_on_public_records_is_charged_for_its_steps_alone(file):
    plain = load(Job, file)
    public = load(Job, file, ["evaluation.on=public", "evaluation.source=public.csv", "evaluation.rungs=[20]"])
    assert public.evaluation.source == str(file.parent / "public.csv")
    assert public.charges() == plain.charges()[:1]
    assert (public.charged, plain.charged) == (plain.accounts[:1], plain.accounts)
    assert load(Job, file, ["evaluation.on=public", "evaluation.source=sklearn:digits"]).charged == plain.accounts[:1]


def test_a_unit_s_loss_costs_what_one_record_does_however_many_it_has(file):
    loss = load(Job, file, ["evaluation.metric=loss", "privacy.max_records_per_unit=40"]).histogram
    assert (loss.scale, loss.l2_sensitivity) == (5.0 * LOSS_PARTS, LOSS_PARTS)
    assert step_cost(loss, 6) == step_cost(DiscreteGaussian(5.0, 1), 6)


TEXT = """
account: talks
privacy: {epsilon: 3.0, delta: 1e-4, unit: user, units: 2000}
data: {source: talks.csv, text: {column: reply, prompt: question, max_length: 64}}
model: {kind: causal-lm, path: "tiny:llama", lora: {target_modules: [q_proj]}}
training: {expected_batch_size: 200}
evaluation: {metric: loss}
"""
CLASSES = [
    "model.kind=sequence-classification",
    "data={source: talks.csv, text: {column: reply}, label: {column: mood, categories: [good, bad]}}",
    "evaluation.metric=accuracy",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.yaml"
    path.write_text(TEXT)
    return path


def test_a_job_of_text_reads_as_it_is_written(text):
    job = load(Job, text)
    assert (job.data.text.max_length, job.model.lora.r, job.model.lora.alpha) == (64, 8, 16.0)
    assert job.target == "adapter", "of a model with adapters"
    assert load(Job, text, ["model.lora=null"]).target == "weights"
    assert load(Job, text, ["release.target=weights"]).target == "weights"
    assert load(Job, text, CLASSES).data.label.column == "mood"


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["model.path=null"], "model.path: it is missing"),
        (["model={kind: linear, path: x}"], "model.path: it is for sequence-classification and causal-lm"),
        (["model={kind: linear, lora: {target_modules: [a]}}"], "model.lora: it is for sequence-classification"),
        (["model={kind: linear}"], "data.text: it is for sequence-classification and causal-lm"),
        (["data.text=null"], "data.text: it is missing"),
        (["data.features={age: {range: [0, 1]}}"], "data.features: a language model reads data.text"),
        (["data.label={column: mood, categories: [a, b]}"], "data.label: a causal model predicts its text"),
        (["evaluation.metric=accuracy"], "evaluation.metric: a causal model has no classes"),
        ([*CLASSES, "data.text.prompt=question"], "data.text.prompt: it is for causal-lm"),
        (["model.lora=null", "release.target=adapter"], "release.target: adapter needs model.lora"),
        (["model.lora.target_modules=[]"], "model.lora.target_modules"),
        (["data.text.max_length=1"], "data.text.max_length"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_its_field(text, assignments, said):
    assert refused(load, Job, text, assignments).startswith(said)
