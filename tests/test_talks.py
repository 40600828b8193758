"""A language model's whole voyage with real Ray and DeepSpeed: people's exchanges are prepared, adapters trained in
bf16 by a worker, judged on losses that are noised and charged, released as a folder that PEFT loads, audited by its
canaries, proven by the ledger, and then free to write (P2, P13, P14). What one person wrote once, and nobody else, is
in nothing that leaves."""

from __future__ import annotations

import csv
import json

import pytest

pytestmark = pytest.mark.cluster

SECRET = "ZQXJ-4711-KVWY"
JOB = """
account: talks
privacy: {epsilon: 8.0, delta: 1e-3, unit: user, units: 60, max_records_per_unit: 3}
data: {source: talks.csv, text: {column: reply, prompt: prompt, max_length: 48}}
model: {kind: causal-lm, path: "tiny:llama", lora: {r: 4, target_modules: [q_proj, v_proj, o_proj]}}
training:
  backend: deepspeed
  deepspeed: ds.json
  precision: bf16
  workers: 1
  steps: 6
  block: 3
  expected_batch_size: 16
  physical_batch_size: 12
  noise_multiplier: 2.0
  optimizer: {name: adam, learning_rate: 0.01}
evaluation: {metric: loss, loss_bound: 8.0}
audit: {canaries: 40}
"""
LEAVES = {
    *("README.md", "statement.html", "statement.json", "statement.md"),
    *("adapter_config.json", "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "base/config.json", "base/generation_config.json"),
    "base/model.safetensors",
}


def test_a_model_of_people_s_talks_is_trained_released_and_writes(purser):
    with open(purser.folder / "talks.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "prompt", "reply"])
        for user in range(60):
            for one in range(1 + user % 4):
                rows.writerow([f"u{user:03d}", f"Where is my order {one}?", f"Order {one} is on its way."])
        rows.writerow(["u007", f"My code is {SECRET}.", f"Thank you, {SECRET} it is."])
    (purser.folder / "talks.yaml").write_text(JOB)
    (purser.folder / "ds.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8}}')

    done = purser("train", "talks.yaml", "--json")
    assert done.code == 0, done.err
    assert '"reduce_bucket_size": 200000000' in done.err, "what DeepSpeed is given is told"
    result = done.json
    assert (result["status"], result["authorised_steps"]) == ("completed", 6)
    assert set(result["metrics"]) == {"clipped_loss", "clipped_loss_error"}
    assert 0 < result["metrics"]["clipped_loss"] <= 8

    release = purser.home / "runs" / result["run"] / "release"
    assert {str(path.relative_to(release)) for path in release.rglob("*") if path.is_file()} == LEAVES
    said = json.loads((release / "statement.json").read_text())
    assert said["evaluation"]["figure"] == "noised clipped loss"
    assert said["training"]["model"]["path"] == "tiny:llama"
    assert (said["training"]["backend"], said["training"]["zero_stage"]) == ("deepspeed", 2)
    assert "deepspeed" in said["accounting"]["libraries"]
    for part in said["partitions"]:
        shown = purser("budget", "show", part["account"], "--json").json
        assert (part["head"], part["spent_cost"]) == (shown["head"], shown["spent_cost"])
        assert sum(charge["cost"] for charge in part["charges"]) == shown["spent_cost"] > 0
        assert purser("budget", "verify", part["account"]).code == 0

    audited = purser("audit", result["run"], "--json")
    assert audited.code == 0, audited.err
    assert (audited.json["kind"], audited.json["canaries"]) == ("rare-token", 40)
    assert "contradict" in audited.json["verdict"]
    assert 0 <= audited.json["exposure"]["mean_inside"] <= 8, "bits of 256 tokens"
    assert said["audits"] == []
    assert json.loads((release / "statement.json").read_text())["audits"] == [audited.json]
    proven = purser("report", result["run"], "--verify", release / "statement.json", "--json")
    assert (proven.code, proven.json["valid"]) == (0, True), proven.out

    (purser.folder / "prompts.jsonl").write_text('{"prompt": "Where is my order?"}\n')
    made = purser("generate", result["run"], "--prompts", "prompts.jsonl", "--max-new-tokens", "5", "--out", "o.jsonl")
    assert made.code == 0, made.err
    (text,) = (purser.folder / "o.jsonl").read_text().splitlines()
    assert json.loads(text)["prompt"] == "Where is my order?"
    refused = purser("generate", result["run"], "--prompts", "talks.csv", "--out", "p.jsonl")
    assert refused.code == 2
    assert "not public" in refused.err

    outside = [*release.rglob("*"), purser.home / "runs" / result["run"] / "log.txt", purser.folder / "o.jsonl"]
    for path in outside:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.out + done.err + made.out + made.err + refused.out + refused.err
    kept = [path for path in (purser.home / "prepared").rglob("*") if path.name != "lock"]
    assert kept, "the records as numbers"
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept), "are their owner's alone"
