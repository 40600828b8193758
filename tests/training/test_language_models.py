"""Language models of a job: what trains, what is frozen, what is refused by its field; what is released of them loads
in a fresh process and says what the trained model says, and holds nothing else (P13)."""

from __future__ import annotations

import copy
import csv
import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from product import DIGITS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig

from cluster.accounting.costs import budget_cost, price
from cluster.accounting.orders import choose, order_table
from cluster.errors import PurserError, UsageError
from training import language
from training.config import Job
from training.engine.sampling import Shard
from training.engine.trainer import PrivateTrainer, fixed_state
from training.evaluation import PublicRecords, exact
from training.jobfile import load, override, parse
from training.models import rehearsed
from training.release import LEAVING, left, write_model, write_release
from training.statement import statement
from training.tokens import encode, tokenizer_of
from tuning.config import SweepJob

LENGTH = 24
SECRET = "zx81 quokka"


def job_of(kind: str = "causal-lm", path: str = "tiny:llama", lora: Any = None, **values: Any) -> Job:
    """A job on texts; `lora`: target modules, or nothing."""
    raw: dict[str, Any] = {
        "account": "people",
        "privacy": {"epsilon": 3.0, "delta": 1e-4, "unit": "person", "units": 2000, "max_records_per_unit": 2},
        "data": {"source": "people.csv", "text": {"column": "text", "max_length": LENGTH}},
        "model": {"kind": kind, "path": str(path)},
        "training": {"steps": 4, "block": 4, "expected_batch_size": 32, "physical_batch_size": 8},
        "evaluation": {"metric": "loss"},
    }
    if kind == "sequence-classification":
        raw["data"]["label"] = {"column": "label", "categories": ["bad", "good", "none"]}
        raw["evaluation"] = {}
    if lora:
        raw["model"]["lora"] = {"r": 4, "target_modules": list(lora)}
    return parse(Job, override(raw, values))


def shard_of(job: Job, texts: list[str], labels: list[int] | None = None) -> Shard:
    """Texts as records, each a unit of its own, as the workers of a run have them."""
    causal = job.model.kind == "causal-lm"
    tokens = encode(tokenizer_of(job.model), job.data.text, texts, None, causal)
    ids = torch.from_numpy(tokens.ids).long()
    at = torch.arange(ids.shape[1])
    mask = (at < torch.from_numpy(tokens.length)[:, None]).long()
    wanted = ids.masked_fill(mask == 0, -100) if causal else torch.tensor(labels or [0] * len(texts))
    return Shard(ids, wanted, np.arange(len(texts) + 1), mask)


def trains(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


TEXTS = [f"{word} {SECRET} number {i}" for i, word in enumerate(["good", "bad", "rather good", "", "so"] * 8)]
LLAMA, BERT = ("q_proj", "v_proj"), ("query", "value")
KINDS = {
    "adapter, causal": lambda: job_of(lora=LLAMA),
    "adapter, classes": lambda: job_of("sequence-classification", "tiny:bert", BERT),
    "adapter, llama, classes": lambda: job_of("sequence-classification", lora=LLAMA),
    "weights, causal": lambda: job_of(),
    "weights, classes": lambda: job_of("sequence-classification", "tiny:bert"),
    "merged": lambda: job_of(lora=LLAMA, **{"release.target": "weights"}),
    "merged, classes": lambda: job_of("sequence-classification", "tiny:bert", BERT, **{"release.target": "weights"}),
}


def trained(job: Job) -> PrivateTrainer:
    """After the job's steps, with its noise."""
    trainer, seen = rehearsed(job)
    assert seen.largest_norm <= 1 + 1e-5
    trainer.steps(shard_of(job, TEXTS, [i % 3 for i in range(len(TEXTS))]), job.training.steps)
    return trainer


@functools.cache
def made(kind: str) -> tuple[Job, Any]:
    """The job of a kind, and its model as training left it; not to be changed."""
    job = KINDS[kind]()
    return job, trained(job).unhook()  # which checks what is frozen, bit by bit


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_its_rehearsal_trains_and_keeps_its_base(kind):
    job, model = made(kind)
    names = trains(model)
    if job.model.lora:
        assert all("lora_" in name or "modules_to_save" in name for name in names)
        assert any("modules_to_save" in name for name in names) == (job.model.kind == "sequence-classification")
        fresh = language.build(job)
        assert fixed_state(model) == fixed_state(fresh) != {}
        theirs = dict(fresh.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, theirs[name]) == (name not in names), name
    else:
        frozen = {name for name, _ in model.named_parameters()} - set(names)
        assert frozen == ({"bert.embeddings.position_embeddings.weight"} if "bert" in job.model.path else set())


def test_a_model_is_the_same_each_time_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = language.build(job_of("sequence-classification", "tiny:bert", BERT)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = language.build(job_of("sequence-classification", "tiny:bert", BERT)).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def check_in_a_fresh_process(made: list[tuple[Job, Any, Path]], folder: Path) -> None:
    """Releases alone, loaded as their cards say by who knows nothing of Purser, give the same logits."""
    rows = {}
    for job, _, release in made:
        shard = shard_of(job, TEXTS[:5])
        rows[str(release)] = [row[: int(m.sum())].tolist() for row, m in zip(shard.features, shard.mask, strict=True)]
    script = f"""
import json, os, sys, torch
said = {{}}
for release, rows in json.loads(sys.stdin.read()).items():
    os.chdir(release)
    code = open("README.md").read().split("```python\\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 4
    exec(code)
    model.eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    said[release] = tokenizer({TEXTS[0]!r})["input_ids"], list(model.config.id2label.values()), logits
assert "training" not in sys.modules
torch.save(said, {str(folder / "said.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(rows), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = torch.load(folder / "said.pt")
    for job, model, release in made:
        ids, labels, logits = said[str(release)]
        assert ids == tokenizer_of(job.model)(TEXTS[0])["input_ids"]
        if job.data.label is not None:
            assert labels == list(job.data.label.categories)
        most = 1e-4 if job.model.lora and job.target == "weights" else 1e-5  # fp32, and what merging rounds
        model.eval()
        with torch.no_grad():
            for row, theirs in zip(rows[str(release)], logits, strict=True):
                assert (model(input_ids=torch.tensor([row])).logits[0] - theirs).abs().max() < most


def released(job: Job, model: Any, folder: Path) -> Path:
    write_model(model, folder, job)
    return write_release(folder, left(folder), statement(job, "run", [ACCOUNT], {"people/train": []}, {}, "none."))


class Account:
    """As much of one as a statement asks for."""

    account, epsilon, delta, order, budget_cost, spent_cost = "people/train", 3.0, 1e-4, 8, 10, 5
    head = {"seq": 1, "hash": "ab"}
    dataset = job_of().dataset()

    def epsilon_of(self, cost: int) -> float:
        return 0.5


ACCOUNT: Any = Account()


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Of every kind its job, its trained model and its release; and how a model with tied weights is."""
    all_of_them = {}
    for kind in KINDS:
        folder, (job, model) = tmp_path_factory.mktemp("run"), made(kind)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        (folder / "model").mkdir()
        (folder / "model" / "notes.txt").write_text(SECRET)  # of an earlier start
        all_of_them[kind] = job, model, released(job, model, folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "as it was"
    folder = tmp_path_factory.mktemp("run")
    job = job_of(path=saved(tied_llama(), folder / "home" / "llama"), **{"training.clipping": "hooks"})
    model = trained(job).unhook()
    return all_of_them | {"tied": (job, model, released(job, model, folder))}


def test_every_release_loads_in_a_fresh_process(releases, tmp_path):
    check_in_a_fresh_process(list(releases.values()), tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, "tied"])
def test_a_release_holds_nothing_else(kind, releases):
    job, _, release = releases[kind]
    files = {str(path.relative_to(release)) for path in release.rglob("*") if path.is_file()}
    ours = {"README.md", "statement.html", "statement.json", "statement.md"}
    assert files <= {*LEAVING, *ours}
    said = json.loads((release / "statement.json").read_text())
    assert {*ours, said["released"]["file"], "tokenizer.json"} <= files
    assert said["released"]["target"] == job.target
    assert ("transformers" in said["accounting"]["libraries"], "peft" in said["accounting"]["libraries"]) == (
        True,
        job.model.lora is not None,
    )
    if job.target == "adapter":
        assert "model.safetensors" not in files
        frozen = [name for name in load_file(release / "adapter_model.safetensors") if "lora" not in name]
        assert all("classifier" in name or "score" in name for name in frozen)
        first = language.build(job.with_values({"model.lora": None, "release.target": None})).state_dict()
        base = load_file(release / "base" / "model.safetensors")
        assert all(torch.equal(base[name], first[name]) for name in base)
    for path in release.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert str(release.parent).encode() not in content, path
            assert b"people.csv" not in content, path


def test_what_a_library_leaves_in_the_folder_does_not_leave(tmp_path, monkeypatch):
    """Broken on purpose: were the folder copied as it is, PEFT's own card would go out, with the path of the base."""
    job = job_of(lora=LLAMA)
    real = language.save

    def more(model, job, folder):
        real(model, job, folder)
        (folder / "training_args.bin").write_text(SECRET)
        (folder / "checkpoint-1").mkdir()

    monkeypatch.setattr(language, "save", more)
    release = released(job, language.build(job), tmp_path)
    assert (left(tmp_path) / "training_args.bin").exists()
    assert not (release / "training_args.bin").exists()
    assert not (release / "checkpoint-1").exists()
    assert "Model Card for Model ID" not in (release / "README.md").read_text()


def saved(model: Any, folder: Path) -> Path:
    """A model in a local folder, with a tokenizer."""
    model.save_pretrained(folder)
    tokenizer_of(job_of().model).save_pretrained(folder)
    return folder


def tied_llama(**more: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, max_position_embeddings=64, tie_word_embeddings=True, **sizes, **more)
    return AutoModelForCausalLM.from_config(config)


def test_tied_weights_are_released_once(releases):
    job, _, release = releases["tied"]
    assert "lm_head.weight" not in load_file(release / "model.safetensors")
    with pytest.raises(UsageError, match="one tied weight.*training\\.clipping: hooks"):
        rehearsed(job.with_values({"training.clipping": "bookkeeping"}))


def test_a_local_folder_is_named_and_not_told_of(tmp_path):
    """Where it lies is nobody's business; which it was, its digest says."""
    folder = saved(tied_llama(), tmp_path / "home" / "llama")
    job = job_of(path=folder, lora=LLAMA)
    release = released(job, language.build(job), tmp_path)
    assert json.loads((release / "adapter_config.json").read_text())["base_model_name_or_path"] == "llama"
    for path in release.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    said = json.loads((release / "statement.json").read_text())
    assert said["training"]["model"]["path"] == "llama"
    assert "the pretrained model llama, model.safetensors SHA-256 " in said["public_data"]
    assert not (release / "base").exists()


def test_what_no_file_has_trains_and_is_released(tmp_path):
    """An encoder without a pooler: were the new one frozen, whoever loads the release would draw another."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=259, **sizes), add_pooling_layer=False)
    job = job_of("sequence-classification", saved(encoder, tmp_path / "encoder"), BERT)
    model = trained(job).unhook()
    fresh = {name.split(".modules_to_save")[0] for name in trains(model) if "modules_to_save" in name}
    assert {name.rpartition(".")[2] for name in fresh} == {"dense", "classifier"}
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0
    torch.manual_seed(3)
    release = released(job, model, tmp_path)
    names = load_file(release / "adapter_model.safetensors")
    assert any("pooler" in name for name in names)
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    ids, again = torch.arange(1, 9)[None], PeftModel.from_pretrained(base, release).eval()
    with torch.no_grad():
        assert (again(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max() < 1e-6


def test_gpt2_takes_adapters_on_its_transposed_layers(tmp_path):
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    folder = saved(GPT2LMHeadModel(config), tmp_path / "gpt2")
    model = trained(job_of(path=folder, lora=("c_attn",))).unhook()
    assert model.peft_config["default"].fan_in_fan_out is True
    with pytest.raises(UsageError, match=r"Conv1D\) has no per-record gradient here"):
        rehearsed(job_of(path=folder))


def test_mistakes_are_told_by_their_field(tmp_path):
    folder = saved(tied_llama(), tmp_path / "llama")
    encoder = saved(
        BertModel(BertConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        tmp_path / "bert",
    )
    small = saved(tied_llama(), tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    for job, sentence in (
        (
            job_of(path=folder, **{"data.text.max_length": 65}),
            r"data\.text\.max_length: 65 .* reads 64 tokens, choose 64",
        ),
        (job_of(lora=("q_proj", "query")), r"model\.lora\.target_modules: 'query' .* this model has .*q_proj"),
        (job_of(path="tiny:bert"), r"model\.path: tiny:bert .* no causal model"),
        (job_of(path=tmp_path / "nowhere"), r"model\.path: .*nowhere"),
        (job_of(path=encoder), r"model\.path: .* (is not in it|no causal-lm model can be loaded)"),
        (job_of(path=small), r"model\.path: "),
        (job_of("sequence-classification", "tiny:bert", **{"data.label": None}), r"data\.label: it is missing"),
    ):
        with pytest.raises(UsageError, match=sentence) as raised:
            language.build(job)
        assert str(raised.value).count("\n") == 0
        assert raised.value.__cause__ is raised.value.__context__ is None


def test_an_adapter_that_no_gradient_reaches_is_named(monkeypatch):
    """Broken on purpose: the second of two layers is never used, as with a configuration that says one."""
    real = language.build

    def shorter(job):
        model = real(job)
        model.config.num_hidden_layers = 1
        return model

    monkeypatch.setattr(language, "build", shorter)
    with pytest.raises(PurserError, match=r"layers\.1\.self_attn\.q_proj\.lora_A.* gradient"):
        rehearsed(job_of(lora=LLAMA))


def test_a_checkpoint_of_a_model_with_adapters_is_small_and_goes_on():
    job = job_of("sequence-classification", "tiny:bert", BERT)
    before = trained(job)
    state = before.state_dict()
    assert sum(tensor.numel() for tensor in state["model"].values()) < 0.05 * sum(
        p.numel() for p in before.model.parameters()
    )
    after, _ = rehearsed(job)
    after.load_state_dict(state)
    for ours, theirs in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_paths_of_models_are_made_absolute_and_hub_ids_are_not(tmp_path):
    (tmp_path / "here").mkdir()
    raw = job_of(lora=LLAMA).model_dump_json()
    (tmp_path / "job.yaml").write_text(raw)
    for given, path in (
        ("here", str(tmp_path / "here")),
        ("./gone", str(tmp_path / "gone")),
        ("org/name", "org/name"),
        ("tiny:llama", "tiny:llama"),
    ):
        assert load(Job, tmp_path / "job.yaml", [f"model.path={given}"]).model.path == path


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("kind", ["adapter, causal", "adapter, classes", "adapter, llama, classes"])
def test_padded_records_are_judged_as_each_alone(kind, rows):
    """Of unequal lengths, in batches of any size, the last one not full."""
    job = KINDS[kind]()
    torch.manual_seed(4)
    model = language.build(job)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.3)
    model.eval()
    labels = [i % 3 for i in range(7)]
    shard = shard_of(job, [text[: 3 * i] for i, text in enumerate(TEXTS[:7])], labels)
    assert len(set(shard.mask.sum(1).tolist())) > 4
    found, right = [], 0
    for i in range(7):
        ids = shard.features[i : i + 1, : int(shard.mask[i].sum())]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        if job.model.kind == "causal-lm":
            lost = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).double()
            found.append(min(10.0, lost.item()))
        else:
            right += int(logits.argmax()) == labels[i]
    said = exact(model, PublicRecords(shard), job.evaluation, rows)
    if job.model.kind == "causal-lm":
        assert said["clipped_loss"] == pytest.approx(np.mean(found), abs=1e-5)
    else:
        assert said["correct"] == right


def dialogues(job: Job, path: str, unit: str | None = None) -> Shard:
    """Invented exchanges as records; with `unit` a column by which they belong together."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row[unit or "user"])
    text, prompts = [row["reply"] for row in rows], [row["prompt"] for row in rows]
    tokens = encode(tokenizer_of(job.model), job.data.text, text, prompts, True)
    ids, at = torch.from_numpy(tokens.ids).long(), torch.arange(job.data.text.max_length)
    mask = (at < torch.from_numpy(tokens.length)[:, None]).long()
    unheard = (mask == 0) | (at < torch.from_numpy(tokens.prompt)[:, None])
    ends = [i + 1 for i in range(len(rows) - 1) if unit is None or rows[i][unit] != rows[i + 1][unit]]
    return Shard(ids, ids.masked_fill(unheard, -100), np.array([0, *ends, len(rows)]), mask)


@pytest.fixture(scope="module")
def dialogue_run():
    """The shipped job with little noise, its trainer, and how that begins."""
    few = ["training.noise_multiplier=0.5", "training.steps=8", "training.block=8"]
    job = load(SweepJob, DIGITS.parent / "dialogue-lora.yaml", few).plain
    trainer, _ = rehearsed(job)
    return job, trainer, copy.deepcopy(trainer.state_dict())


@pytest.mark.parametrize("hears", [True, False])
def test_a_dialogue_run_learns_public_replies(dialogue_run, hears):
    """Of the shipped job, with little noise, the loss on a public file falls from 5.6 to 4.3 nats in eight
    steps. Broken on purpose: on noise alone, as in a run that hears nothing, it does not.

    Seven runs fell by 1.24 to 1.28 (deviation 0.014), five on noise alone by -0.05 to 0.02 (0.026): the bound is more
    than twenty deviations from both, and a false alarm far below 1e-6.
    """
    job, trainer, start = dialogue_run
    trainer.load_state_dict(start)
    public = PublicRecords(dialogues(job, job.evaluation.source))
    private = dialogues(job, job.data.source, job.privacy.unit)
    assert int(np.diff(private.offsets).max()) <= job.privacy.max_records_per_unit
    if not hears:
        private = replace(private, labels=torch.full_like(private.labels, -100))
    before = exact(trainer.model, public, job.evaluation, trainer.rows)["clipped_loss"]
    trainer.steps(private, 8)
    after = exact(trainer.model, public, job.evaluation, trainer.rows)["clipped_loss"]
    assert (after < before - 0.65) == hears


@pytest.mark.parametrize("name", ["sentiment-lora", "dialogue-lora"])
def test_the_shipped_jobs_fit_their_budget_and_their_model(name):
    job = load(SweepJob, DIGITS.parent / f"{name}.yaml").plain
    assert Path(job.data.source).is_file()
    assert Path(job.evaluation.source).is_file()
    epsilon, delta, charge = job.privacy.epsilon, job.privacy.delta, job.charges()[0]
    order = choose(order_table(epsilon, delta, [charge], 1))
    assert budget_cost(epsilon, delta, order) / price(charge, order) >= 2, "it and one more"
    trainer, seen = rehearsed(job)
    assert seen.parameters < 0.3 * sum(p.numel() for p in trainer.model.parameters())
