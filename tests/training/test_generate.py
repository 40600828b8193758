"""Texts from a release: what transformers itself would write, adapter or whole model, cut at stop words, drawn within
bounds; and prompts that the books know as private are refused (P13)."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from releases import PROMPTS, STATEMENT, TOKENIZER, adapted, llama, release
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaForSequenceClassification

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from cluster.screen import Screen
from training.admission import source_of
from training.config import Job
from training.generate import Sampling, generate, texts_of
from training.jobfile import parse
from training.prompts import read_prompts
from training.released import Released, load_released, released
from training.tokens import prompt_ids

SECRET = "Zyxomma"


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """kind → its release and the model that it was made from."""
    folder = tmp_path_factory.mktemp("runs")
    models = {"whole": llama(), "adapter": adapted()}
    return {kind: (release(folder / kind, model), model.eval()) for kind, model in models.items()}


def greedy(model, prompt, tokens):
    """What transformers writes after one prompt, alone and without padding."""
    ids = torch.tensor(prompt_ids(TOKENIZER, [prompt]))
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=0)
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return TOKENIZER.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def texts(model, how, prompts=PROMPTS):
    return [row["text"] for row in texts_of(model, TOKENIZER, prompts, how)]


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_greedy_is_what_transformers_writes_alone(releases, kind):
    folder, model = releases[kind]
    loaded, tokenizer = load_released(folder)
    assert not loaded.training
    rows = list(texts_of(loaded, tokenizer, PROMPTS, Sampling(temperature=0, max_new_tokens=24)))
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert [row["sample"] for row in rows] == [1] * 4
    assert [row["text"] for row in rows] == [greedy(model, prompt, 24) for prompt in PROMPTS]
    assert len({row["text"] for row in rows}) == 4


def test_the_adapter_is_on_its_base(releases):
    how = Sampling(temperature=0, max_new_tokens=24)
    assert texts(releases["adapter"][1], how) != texts(releases["whole"][1], how)


def test_an_adapter_finds_its_base_elsewhere(tmp_path, releases):
    """A release names a folder's name only; the run's own job, or the caller, knows where it is."""
    folder, model = releases["adapter"]
    shutil.copytree(folder, tmp_path / "run" / "release")
    (tmp_path / "run" / "release" / "base").rename(tmp_path / "a model")
    config = tmp_path / "run" / "release" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base"', '"no/such/model"'))  # nor any hub's id
    with pytest.raises(UsageError, match="^RUN: .*cannot be loaded .*--base"):
        load_released(tmp_path / "run" / "release")
    (tmp_path / "run" / "job.json").write_text(json.dumps({"model": {"path": str(tmp_path / "a model")}}))
    source = Released("run", tmp_path / "run" / "release")
    loaded, _ = load_released(source.folder, source.model_path)
    how = Sampling(temperature=0, max_new_tokens=8)
    assert texts(loaded, how) == texts(model, how)


def test_a_prompt_begins_as_in_training_and_has_no_end():
    begin, end = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    for prompt, ids in zip(PROMPTS, prompt_ids(TOKENIZER, PROMPTS), strict=True):
        assert ids[0] == begin
        assert end not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == prompt


def test_stop_words_cut_and_stop(releases):
    _, model = releases["whole"]
    whole = texts(model, Sampling(temperature=0, max_new_tokens=24))
    word = next(text[4:7] for text in whole if "\ufffd" not in text[4:7] and len(text) > 8)
    cut = texts(model, Sampling(temperature=0, max_new_tokens=24, stop=("never there", word)))
    for before, after in zip(whole, cut, strict=True):
        assert after == before.split(word)[0]
    assert cut != whole
    ran = []
    model_generate = model.generate
    try:
        model.generate = lambda **more: ran.append(model_generate(**more)) or ran[-1]
        one = PROMPTS[next(i for i, text in enumerate(whole) if word in text)]
        texts(model, Sampling(temperature=0, max_new_tokens=90, stop=(word,)), [one])
    finally:
        del model.generate
    assert ran[0].shape[1] < 90, "it is not written on to the end, and cut then"


def test_samples_differ_and_a_seed_draws_them_again(releases):
    _, model = releases["whole"]
    how = Sampling(count=9, max_new_tokens=12, temperature=1.5, seed=5)
    rows = list(texts_of(model, TOKENIZER, PROMPTS[:2], how))
    assert [row["sample"] for row in rows] == [*range(1, 10)] * 2
    drawn = [row["text"] for row in rows]
    assert len(set(drawn)) > 9
    before = torch.random.get_rng_state()
    assert texts(model, how, PROMPTS[:2]) == drawn
    assert torch.equal(before, torch.random.get_rng_state()), "who else draws in this process is not disturbed"
    assert texts(model, dataclasses.replace(how, seed=6), PROMPTS[:2]) != drawn
    unseeded = dataclasses.replace(how, seed=None)
    assert texts(model, unseeded, PROMPTS[:2]) != texts(model, unseeded, PROMPTS[:2])


def test_a_small_top_p_leaves_the_likeliest_only(releases):
    _, model = releases["whole"]
    least = texts(model, Sampling(max_new_tokens=24, top_p=1e-6, temperature=2.0))
    assert least == texts(model, Sampling(max_new_tokens=24, temperature=0))


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"count": 0}, "--count"),
        ({"count": -1}, "--count"),
        ({"count": 2, "temperature": 0}, "--count"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"top_p": float("nan")}, "--top-p"),
        ({"stop": ("",)}, "--stop"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_numbers_out_of_bounds_are_refused(given, option):
    with pytest.raises(UsageError, match=f"^{option}: "):
        Sampling(**given)


def test_a_prompt_without_room_is_refused(releases):
    with pytest.raises(UsageError, match="--max-new-tokens: 100 was given; the longest prompt has 34 tokens"):
        texts(releases["whole"][1], Sampling(max_new_tokens=100))


def test_what_writes_no_texts_is_refused(tmp_path):
    classifier = release(tmp_path / "classes", llama(LlamaForSequenceClassification))
    with pytest.raises(UsageError, match="^RUN: .*no causal model"):
        load_released(classifier)
    of_classes = release(tmp_path / "adapter", adapted())
    said = (of_classes / "adapter_config.json").read_text().replace("CAUSAL_LM", "SEQ_CLS")
    (of_classes / "adapter_config.json").write_text(said)
    with pytest.raises(UsageError, match="^RUN: .*no causal model"):
        load_released(of_classes)
    (of_classes / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="^RUN: .*names no base model"):
        load_released(of_classes)
    table = tmp_path / "table"
    table.mkdir()
    save_file({"0.weight": torch.zeros(2, 2)}, table / "weights.safetensors")
    with pytest.raises(UsageError, match="^RUN: .*no language model"):
        load_released(table)
    broken = release(tmp_path / "broken", llama())
    (broken / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match="^RUN: .*cannot be loaded") as caught:
        load_released(broken)
    assert caught.value.__context__ is None
    torch.save(llama().state_dict(), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="^RUN: .*cannot be loaded"):
        load_released(broken)


def books_of(home):
    home.mkdir()
    return Books(Ledger(f"sqlite:///{home / 'ledger.db'}"))


def job_over(source):
    return parse(
        Job,
        {
            "account": "people",
            "privacy": {"epsilon": 3.0, "delta": 1e-4, "units": 200},
            "data": {
                "source": str(source),
                "features": {"age": {"range": [0, 9]}},
                "label": {"column": "prompt", "categories": ["a", "b"]},
            },
            "model": {"kind": "linear"},
            "training": {"expected_batch_size": 50},
        },
    )


def table(path, rows):
    path.write_text("prompt,age\n" + "".join(f'"{prompt}",{age}\n' for prompt, age in rows))
    return path


def test_prompts_that_are_private_are_refused(tmp_path):
    private = table(tmp_path / "people.csv", [(SECRET, 1), ("Bob", 2)])
    job, books = job_over(private), books_of(tmp_path / "home")
    books.create(
        job.dataset([source_of(books, job)]),
        3.0,
        1e-4,
        {a: [c] for a, c in zip(job.accounts, job.charges(), strict=True)},
        1,
    )
    nowhere = Released("other-1", tmp_path / "other" / "release")

    (tmp_path / "copy.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "age": a}) + "\n" for p, a in [("Bob", "2"), (SECRET, "1")])
    )
    for known in (private, table(tmp_path / "copy.csv", [("Bob", 2), (SECRET, 1)]), tmp_path / "copy.jsonl"):
        with pytest.raises(UsageError, match="^--prompts: .*the source of a dataset in this ledger") as caught:
            read_prompts(known, "prompt", nowhere, books)
        assert SECRET not in str(caught.value)
    part = table(tmp_path / "part.csv", [("Bob", 2)])
    found = read_prompts(part, "prompt", nowhere, books)
    assert found.texts == ("Bob",), "single records are not looked for: the answer would tell"

    (tmp_path / "run" / "release").mkdir(parents=True)
    (tmp_path / "run" / "job.json").write_text(job_over(part).model_dump_json())
    own = Released("run", tmp_path / "run" / "release")
    (tmp_path / "link.csv").symlink_to(part)
    for known in (part, tmp_path / "link.csv"):
        with pytest.raises(UsageError, match="^--prompts: .* is what run was trained on"):
            read_prompts(known, "prompt", own, books)
    (tmp_path / "run" / "job.json").write_text(job_over(tmp_path).model_dump_json())
    with pytest.raises(UsageError, match="^--prompts: part.csv is what run was trained on"):
        read_prompts(part, "prompt", own, books)


def test_a_bad_prompts_file_is_refused_and_nothing_of_it_said(tmp_path):
    books, source = books_of(tmp_path / "home"), Released("x", tmp_path / "release")
    files = {
        "absent.csv": None,
        "prompts.txt": SECRET,
        "empty.csv": "prompt\n",
        "other.csv": f"text\n{SECRET}\n",
        "ragged.csv": f"prompt,age\n{SECRET}\n",
        "broken.jsonl": f'{{"prompt": "{SECRET}"\n',
        "list.jsonl": f'["{SECRET}"]\n',
        "keys.jsonl": f'{{"prompt": "a"}}\n{{"{SECRET}": "b"}}\n',
        "empty.jsonl": "",
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="^(--prompts|--column): ") as caught:
            read_prompts(tmp_path / name, "prompt", source, books)
        assert SECRET not in str(caught.value)
        assert caught.value.__context__ is None
    (tmp_path / "right.jsonl").write_text('{"id": 1, "prompt": "Dear Ada,"}\n{"id": 2, "prompt": ""}\n')
    assert read_prompts(tmp_path / "right.jsonl", "prompt", source, books).texts == ("Dear Ada,", "")


def test_a_release_is_found_by_name_and_by_path(home, releases):
    folder, _ = releases["whole"]
    assert released(str(folder)) == Released("people-1", folder), "as its statement says"
    (home / "runs" / "people-1" / "release").mkdir(parents=True)
    with pytest.raises(UsageError, match="^RUN: people-1 released nothing"):
        released("people-1")
    (home / "runs" / "people-1" / "release" / "statement.json").write_text("{}")
    assert released("people-1").run == "people-1"
    with pytest.raises(UsageError, match="no privacy statement"):
        released("people-1").statement()
    for absent in ("people-2", str(home), "../x"):
        with pytest.raises(UsageError, match="^RUN: "):
            released(absent)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_texts_leave_with_their_statement(tmp_path, releases, ending):
    folder, _ = releases["whole"]
    prompts = table(tmp_path / "prompts.csv", [("Dear Ada,", 1), ("Dear Bob,", 2)])
    source, out = Released("people-1", folder), tmp_path / f"texts.{ending}"
    given = read_prompts(prompts, "prompt", source, books_of(tmp_path / "home"))
    result = generate(source, given, Sampling(count=2, max_new_tokens=6, top_p=0.9, seed=1), out, Screen(True))
    assert set(result) == {"run", "prompts", "count", "out", "statement"}
    assert (result["run"], result["prompts"], result["count"]) == ("people-1", 2, 2)
    rows = pq.read_table(out).to_pylist() if ending == "parquet" else [*map(json.loads, out.read_text().splitlines())]
    assert [list(row) for row in rows] == [["prompt", "text", "sample"]] * 4
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, n) for p in given.texts for n in (1, 2)]
    said = json.loads((tmp_path / f"texts.{ending}.statement.json").read_text())
    assert said["guarantee"] == STATEMENT["guarantee"]
    made = said["generated"]
    assert made["prompts"]["file"] == "prompts.csv"
    assert len(made["prompts"]["sha256"]) == 64
    assert (made["temperature"], made["top_p"], made["count"], made["texts"]) == (1.0, 0.9, 2, 4)
    assert "costs nothing" in made["cost"]
    with pytest.raises(UsageError, match="--out: .* is there already"):
        generate(source, given, Sampling(), out, Screen(True))
    out.unlink()
    with pytest.raises(UsageError, match=r"--out: .*statement.json is there already"):
        generate(source, given, Sampling(), out, Screen(True))
    for wrong in ("texts.txt", f"absent/texts.{ending}"):
        with pytest.raises(UsageError, match="^--out: "):
            generate(source, given, Sampling(), tmp_path / wrong, Screen(True))


def test_the_command_prints_its_contract_and_refuses_in_a_sentence(purser, releases):
    folder, _ = releases["adapter"]
    (purser.folder / "prompts.jsonl").write_text('{"prompt": "Dear Ada,"}\n{"prompt": "Dear Bob,"}\n')
    right = ["generate", folder, "--prompts", "prompts.jsonl", "--max-new-tokens", "8"]
    ended = purser(*right, "--count", "2", "--stop", "a", "--stop", "b", "--seed", "3", "--json")
    assert ended.code == 0, ended.err
    assert len(ended.out.strip().splitlines()) == 1, "--json keeps stdout clean"
    assert ended.json == {
        "run": "people-1",
        "prompts": 2,
        "count": 2,
        "out": str(purser.folder / "generated.jsonl"),
        "statement": str(purser.folder / "generated.jsonl.statement.json"),
    }
    assert "nobody's secret" in ended.err
    assert "Ledger sqlite" in ended.err
    assert len((purser.folder / "generated.jsonl").read_text().splitlines()) == 4
    absent = purser("generate", "never-was", *right[2:], "--out", "x.jsonl")
    assert (absent.code, absent.err[:22]) == (2, "purser: RUN: never-was")
    for arguments, words in [
        ([*right, "--count", "0", "--out", "x.jsonl"], ["--count: 0 was given"]),
        (right, ["--out: generated.jsonl is there already"]),
        ([*right[:2], "--out", "x.jsonl"], ["--prompts"]),
        ([*right, "--column", "text", "--out", "x.jsonl"], ["--column: --prompts has no column 'text'"]),
    ]:
        refused = purser.here(*arguments)
        assert refused.code == 2, refused.err
        (said,) = refused.err.splitlines()
        assert all(word in said for word in words), said
        assert "Traceback" not in refused.err
