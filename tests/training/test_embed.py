"""Vectors of public texts: the mean of the last hidden state over a text's own tokens, whatever stands beside it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from releases import PROMPTS, STATEMENT, TOKENIZER, adapted, release

from cluster.errors import UsageError
from training.embed import vectors_of
from training.tokens import prompt_ids

SAME = 1e-5


def alone(model, text, most):
    ids = torch.tensor(prompt_ids(TOKENIZER, [text]))[:, :most]
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0).numpy()


def test_a_vector_is_of_its_text_alone():
    model = adapted().eval()
    for most in (128, 5):
        found = vectors_of(model, TOKENIZER, PROMPTS * 5, most)
        assert found.shape == (20, 32)
        assert found.dtype == np.float32
        for vector, text in zip(found, PROMPTS * 5, strict=True):
            assert np.abs(vector - alone(model, text, most)).max() < SAME
    for wrong in (0, 129):
        with pytest.raises(UsageError, match=f"^--max-length: {wrong} was given"):
            vectors_of(model, TOKENIZER, PROMPTS, wrong)


def test_the_command_writes_vectors_and_their_statement(purser, tmp_path):
    model = adapted()
    folder = release(tmp_path / "run", model)
    (purser.folder / "texts.csv").write_text("text\nDear Ada\nDear Bob\n")
    given = ["embed", folder, "--texts", "texts.csv", "--max-length", "100"]
    ended = purser(*given, "--json")
    assert ended.code == 0, ended.err
    assert ended.json == {
        "run": "people-1",
        "texts": 2,
        "width": 32,
        "out": str(purser.folder / "embeddings.parquet"),
        "statement": str(purser.folder / "embeddings.parquet.statement.json"),
    }
    rows = pq.read_table(purser.folder / "embeddings.parquet").to_pylist()
    assert [row["text"] for row in rows] == ["Dear Ada", "Dear Bob"]
    for row in rows:
        assert np.abs(np.array(row["embedding"]) - alone(model.eval(), row["text"], 100)).max() < SAME
    said = json.loads((purser.folder / "embeddings.parquet.statement.json").read_text())
    assert said["guarantee"] == STATEMENT["guarantee"]
    assert said["embedded"]["texts"]["file"] == "texts.csv"
    for arguments, words in [
        (given, "--out: embeddings.parquet is there already"),
        ([*given, "--out", "x.jsonl"], "--out: x.jsonl was given"),
        ([*given, "--out", "x.parquet", "--column", "body"], "--column: --texts has no column 'body'"),
        ([*given[:3], "absent.csv"], "--texts: absent.csv does not exist"),
    ]:
        if words.startswith("--texts"):
            arguments = [*arguments, "--out", "x.parquet"]
        command = purser if words.startswith("--texts") else purser.here
        refused = command(*arguments)
        assert refused.code == 2
        assert words in refused.err
