"""lm-evaluation-harness in a process of its own, and its samples as votes that can be paired."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from resafe.errors import ResafeError
from resafe.eval import Results, compare, lmeval
from resafe.eval.lmeval._run import Setup, arguments
from tests.tiny import tiny

DATE = "2026-01-02T03-04-05.678901"
WORDS = ("cat", "dog", "tea", "pot", "sun", "sea", "cup", "box", "hat", "key", "jam", "pie")
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
Write = Callable[..., Path]


def sample(i: int, **more: Any) -> dict[str, Any]:
    return {"doc_id": i, "filter": "none", "metrics": ["acc"], "doc_hash": f"d{i}", "prompt_hash": f"p{i}", "acc": 1.0, **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write samples of a task as the harness does, with a results file beside it if `about` is given."""

    def write(samples: list[dict[str, Any]], task: str = "t", date: str = DATE, about: Any = None, under: str = "m") -> Path:
        file = tmp_path / under / f"samples_{task}_{date}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(s) + "\n" for s in samples))
        if about is not None:
            (file.parent / f"results_{date}.json").write_text(json.dumps(about))
        return file

    return write


def votes(path: Path, suite: str = "lmeval:t") -> dict[str, Any]:
    return dict(lmeval.import_samples(path)[suite].items.votes)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of 24 questions with a local file of data."""
    home = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{ask} the {word} ?", "choices": [WORDS[(i + j) % 12] for j in (1, 2, 3)], "answer": i % 3}
        for i, word in enumerate(WORDS)
        for ask in ("where is", "tell me about")
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (home / "task.yaml").write_text(TASK.format(name="tiny_choice", data=home / "rows.jsonl"))
    return home


@pytest.fixture(scope="module")
def both(task_folder: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """Two random models measured by the real harness: the folder of its outputs, and the results."""
    home = tmp_path_factory.mktemp("measured")
    folders = {name: tiny("llama", home / f"{name}, tiny", aligned, seed=i) for i, name in enumerate(("before", "after"))}
    setup, whole = Setup(include=task_folder), Results()

    def measure(name: str) -> dict[str, lmeval.Measured]:
        return lmeval.measure(folders[name], ["tiny_choice"], limit=20, workdir=home / name, setup=setup)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
        for name, found in zip(folders, pool.map(measure, folders)):
            lmeval.add(whole, {"target": name, "attack": "none", "mitigation": "none", "seed": None}, found)
    return home, whole


def test_the_harness_measures_a_folder_in_its_own_process(both: tuple[Path, Results]) -> None:
    home, results = both
    items = results.items["before"]["lmeval:tiny_choice"]
    assert items.prompts == [str(i) for i in range(20)] and list(items.votes) == ["utility|lm_eval:acc"]
    (file,) = (home / "before").rglob("results_*.json")
    row = results.row("before", "lmeval:tiny_choice", "utility", "lm_eval:acc")
    assert row and row["value"] == pytest.approx(json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"])
    assert "task version 3, 0-shot" in results.meta["suites"]["lmeval:tiny_choice"]["source"]


def test_two_models_are_compared_in_pairs_over_the_harness_samples(both: tuple[Path, Results]) -> None:
    home, results = both
    right = []
    for name in ("before", "after"):
        (file,) = (home / name).rglob("samples_*.jsonl")
        right.append({(s := json.loads(line))["doc_id"]: s["acc"] == 1.0 for line in file.read_text().splitlines()})
    lost = sum(right[0][i] and not right[1][i] for i in right[0])
    won = sum(right[1][i] and not right[0][i] for i in right[0])
    (found,) = [row for row in compare(results, "before") if row["metric"] == "utility"]
    assert lost + won > 0 and found["p"] == pytest.approx(binomtest(lost, lost + won, 0.5).pvalue)
    assert found["difference"] == pytest.approx((won - lost) / 20)


def test_a_run_that_fails_is_one_clear_line_and_keeps_its_log(
    monkeypatch: pytest.MonkeyPatch, aligned: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("resafe.eval.lmeval._run.arguments", lambda *args: ["run", "--limit", "many"])
    seen: list[str] = []
    with pytest.raises(ResafeError) as error:
        lmeval.run(aligned, ["a"], tmp_path / "out", log=seen.append)
    assert "with exit code 2: " in str(error.value) and str(error.value).endswith("invalid float value: 'many'")
    assert "\n" not in str(error.value) and seen[0].startswith("usage:")
    assert (tmp_path / "out/lm_eval.log").read_text().splitlines()[-1] == seen[-1]


def test_the_command_never_caches_and_never_trusts_code(aligned: Path, tmp_path: Path) -> None:
    found = arguments(aligned, ["a", "b_c"], tmp_path, 5, Setup(few_shot=2, chat_template=True))
    assert found[found.index("--tasks") + 1 : found.index("--batch_size")] == ["a", "b_c"]
    assert found[found.index("--limit") + 1] == "5" and found[found.index("--num_fewshot") + 1] == "2"
    assert {"--log_samples", "--apply_chat_template"} <= set(found)
    assert not {"--use_cache", "-c", "--trust_remote_code", "--confirm_run_unsafe_code"} & set(found)


def test_an_adapter_is_measured_on_its_base(aligned: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(aligned)}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    found = arguments(tmp_path, ["a"], tmp_path, None, Setup())
    assert found[found.index("--model_args") + 1] == f"pretrained='{aligned.resolve()}',peft='{tmp_path.resolve()}'"


@pytest.mark.parametrize("name", ["--use_cache", "-x", "a b", "", "../task.yaml"])
def test_an_option_or_a_path_is_no_task(name: str, aligned: Path, tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match="cannot be the name of a task"):
        arguments(aligned, [name], tmp_path, None, Setup())


def test_without_the_harness_the_way_out_is_said(
    monkeypatch: pytest.MonkeyPatch, aligned: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("resafe.eval.lmeval._run.find_spec", lambda name: None)
    with pytest.raises(ResafeError, match=r"pip install 'resafe\[lmeval\]'"):
        lmeval.run(aligned, ["a"], tmp_path)


def test_samples_are_votes_by_document_and_shares_stay_shares(write: Write) -> None:
    file = write([sample(2, acc=0.25), sample(0, acc=1.0), sample(1, acc=0)])
    items = lmeval.import_samples(file)["lmeval:t"].items
    assert items.prompts == ["0", "1", "2"] and len(set(items.keys)) == 3
    assert items.votes == {"utility|lm_eval:acc": [True, False, 0.25]}
    assert [type(v) for v in items.votes["utility|lm_eval:acc"]] == [bool, bool, float]


def test_each_metric_and_way_of_reading_is_a_judge(write: Write) -> None:
    metrics = {"metrics": ["exact_match", "acc"], "acc": 0.0}
    rows = [sample(i, **metrics, filter=f, exact_match=float(f == "loose")) for f in ("strict", "loose") for i in (0, 1)]
    assert votes(write(rows)) == {
        "utility|lm_eval:exact_match,strict": [False, False], "utility|lm_eval:acc,strict": [False, False],
        "utility|lm_eval:exact_match,loose": [True, True], "utility|lm_eval:acc,loose": [False, False],
    }  # fmt: skip


@pytest.mark.parametrize("value", [-3.5, 1.5, [True, False], "yes", None, float("nan")])
def test_a_metric_that_is_no_rate_on_every_sample_is_left_out(write: Write, value: Any) -> None:
    rows = [sample(i, metrics=["acc", "other"], other=value if i else 1.0) for i in (0, 1)]
    assert list(votes(write(rows))) == ["utility|lm_eval:acc"]
    with pytest.raises(ResafeError, match=r"no metric \(acc\) is a rate"):
        lmeval.import_samples(write([sample(0, acc=value)]))


def test_a_metric_that_is_better_when_lower_is_no_utility(write: Write) -> None:
    rows = [sample(0, metrics=["acc", "error"], error=1.0)]
    assert list(votes(write(rows, about={"higher_is_better": {"t": {"error": False}}}))) == ["utility|lm_eval:acc"]


def test_a_group_is_one_suite_when_all_its_tasks_were_run(write: Write, tmp_path: Path) -> None:
    about = {"group_subtasks": {"g": ["h", "c"], "h": ["a", "b"], "c": []}}
    files = [write([sample(i, acc=float(task == "a")) for i in (0, 1)], task, about=about) for task in ("a", "b", "c")]
    (found,) = lmeval.import_samples(tmp_path).values()
    assert found.items.prompts == ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"]
    assert found.items.categories == ["a", "a", "b", "b", "c", "c"]
    assert found.items.votes == {"utility|lm_eval:acc": [True, True, False, False, False, False]}
    files[1].unlink()
    assert list(lmeval.import_samples(tmp_path)) == ["lmeval:a", "lmeval:c"]


def test_a_prompt_asked_in_another_way_has_another_key(write: Write) -> None:
    one, two = (lmeval.import_samples(write([sample(0, prompt_hash=p)]))["lmeval:t"].items.keys for p in ("few", "many"))
    assert one != two


def test_imported_results_are_saved_and_merged_as_others_are(write: Write, tmp_path: Path) -> None:
    parts = [
        lmeval.import_results(write([sample(i, acc=float(i < n)) for i in range(4)], under=str(n)), f"m{n}") for n in (1, 3)
    ]
    found = Results.load(Results.merge(parts).save(tmp_path / "saved"))
    values = [found.row(t, "lmeval:t", "utility", "lm_eval:acc") for t in ("m1", "m3")]
    assert [v and v["value"] for v in values] == [0.25, 0.75]
    assert found.meta["suites"]["lmeval:t"]["n"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("\udcff", "line 1 is not JSON"),
        ('{"acc": 1}', "line 1 is not a sample"),
        ("[1]", "line 1 is not a sample"),
        ("", "holds no samples"),
        (json.dumps(sample(0)) + "\n" + json.dumps(sample(0)), "holds sample 0 twice"),
        (json.dumps(sample(0)) + "\n" + json.dumps(sample(1, filter="x")), "it is not complete"),
    ],
)
def test_a_broken_samples_file_is_named(write: Write, text: str, said: str) -> None:
    file = write([])
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ResafeError, match=said) as error:
        lmeval.import_samples(file)
    assert str(file) in str(error.value)


def test_two_runs_of_a_task_are_not_mixed(write: Write, tmp_path: Path) -> None:
    write([sample(0)])
    write([sample(0)], date="2026-02-03T00-00-00.1")
    with pytest.raises(ResafeError, match="two runs of t"):
        lmeval.import_samples(tmp_path)


def test_an_empty_folder_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match="run it with --log_samples"):
        lmeval.import_samples(tmp_path)
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ResafeError, match="samples_TASK_DATE.jsonl"):
        lmeval.import_samples(tmp_path / "x.jsonl")
