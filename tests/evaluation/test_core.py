"""CORE: prompts, spans, shots, and scores that depend neither on batching nor on what is shared."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import core
from nanochat.evaluation.core import CoreTask, Prompt


def make_task(kind, shots=0, delimiter=" ", baseline=0.0, path=None):
    return CoreTask("task", kind, shots, delimiter, baseline, path)


CHOICE = {"query": "2+2 is", "choices": ["three", "four"], "gold": 1}
SCHEMA = {"context_options": ["The cup fell; the cup", "The cup fell; the table"], "continuation": "broke.", "gold": 0}
CONTINUE = {"context": " The sun is ", "continuation": "hot"}


def test_prompts():
    assert core.texts_of(make_task("multiple_choice", delimiter="\nAnswer: "), CHOICE, [CHOICE]) == [
        "2+2 is\nAnswer: four\n\n2+2 is\nAnswer: three",
        "2+2 is\nAnswer: four\n\n2+2 is\nAnswer: four",
    ]
    assert core.texts_of(make_task("schema"), SCHEMA, [SCHEMA]) == [
        "The cup fell; the cup broke.\n\nThe cup fell; the cup broke.",
        "The cup fell; the cup broke.\n\nThe cup fell; the table broke.",
    ]
    assert core.texts_of(make_task("language_modeling"), CONTINUE, [CONTINUE]) == [
        "The sun is hot\n\nThe sun is",
        "The sun is hot\n\nThe sun is hot",
    ]
    with pytest.raises(NanochatError, match="unknown type 'essay'"):
        core.texts_of(make_task("essay"), CHOICE, [])


def spans_of(tokenizer, kind, example):
    task = make_task(kind)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in core.texts_of(task, example, [])]
    prompt = core.prompt_of(task, rows)
    return [tokenizer.decode(row[a:b]) for row, (a, b) in zip(prompt.rows, prompt.spans, strict=True)]


def test_only_the_part_that_differs_is_scored(tokenizer):
    assert spans_of(tokenizer, "multiple_choice", CHOICE) == ["three", "four"]
    assert spans_of(tokenizer, "schema", SCHEMA) == [" broke.", " broke."]
    assert spans_of(tokenizer, "language_modeling", CONTINUE) == [" hot"]
    assert spans_of(tokenizer, "multiple_choice", {"query": "q", "choices": ["ab", "abc"], "gold": 0}) == ["", "c"]


def test_shots_are_others_and_always_the_same():
    examples = [{"n": i} for i in range(30)]
    for index in (0, 7, 29):
        shots = core.shots_for(examples, index, 10)
        others = [i for i in range(30) if i != index]
        assert [shot["n"] for shot in shots] == random.Random(1234 + index).sample(others, 10)
        assert index not in [shot["n"] for shot in shots] and shots == core.shots_for(examples, index, 10)


def plain_score(model, row, span):
    """The definition, one row at a time, all logits."""
    start, end = span
    with torch.no_grad():
        logits = model(torch.tensor([row]))[0, start - 1 : end - 1]
    target = torch.tensor(row[start:end])
    return F.cross_entropy(logits, target).item(), bool((logits.argmax(-1) == target).all())


def random_prompts():
    rng = random.Random(5)

    def tokens(n):
        return [rng.randrange(256) for _ in range(n)]

    prompts = []
    for length in (3, 40, 200, 90, 31, 33, 34, 400):
        front = [256, *tokens(length)]
        ends = [tokens(rng.randrange(1, 9)) for _ in range(rng.randrange(1, 5))]
        rows = [front + [i, *end] for i, end in enumerate(ends)]
        prompts.append(Prompt(rows, [(len(front), len(row)) for row in rows]))
    tail = tokens(6)
    rows = [[256, *tokens(50), *middle, *tail] for middle in ([1], [2, 3, 4])]
    twin = [[*row[:-1], 7, 8] for row in prompts[3].rows]  # another question behind the same shots
    prompts.append(Prompt(twin, [(start, len(row)) for (start, _), row in zip(prompts[3].spans, twin, strict=True)]))
    return [*prompts, Prompt(rows, [(len(row) - 6, len(row)) for row in rows])]


def test_examples_that_begin_alike_are_computed_once(model):
    prompts = random_prompts()
    twins = [prompts[3], prompts[8]]
    assert twins[0].shared == twins[1].shared > 80
    calls = []
    handle = model.wte.register_forward_hook(lambda module, inputs, _: calls.append(tuple(inputs[0].shape)))
    with torch.inference_mode():
        core.score(model, twins)
    handle.remove()
    assert calls[0] == (1, twins[0].shared), "one front for both"


def test_scores_equal_the_plain_definition_shared_or_not(model):
    prompts = random_prompts()
    assert {prompt.shared > 0 for prompt in prompts} == {True, False}
    with torch.inference_mode():
        together = core.score(model, prompts)
        alone = [core.score(model, [prompt])[0] for prompt in prompts]
    for prompt, batched, single in zip(prompts, together, alone, strict=True):
        expected = [plain_score(model, row, span) for row, span in zip(prompt.rows, prompt.spans, strict=True)]
        for scores in (batched, single):
            assert [hit for _, hit in scores] == [hit for _, hit in expected]
            assert [loss for loss, _ in scores] == pytest.approx([loss for loss, _ in expected], abs=2e-5)


def test_greedy_hits_are_found(model):
    row = [256, *range(60, 100)]
    with torch.no_grad():
        for _ in range(3):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        wrong = [*row[:-1], (row[-1] + 1) % 256]
        scores = core.score(model, [Prompt([row], [(41, 44)]), Prompt([wrong], [(41, 44)])])
    assert [hit for [(_, hit)] in scores] == [True, False]


def test_an_empty_span_is_never_the_best_and_nothing_is_nan(model):
    rows = [[256, 5, 6], [256, 5, 6, 7]]
    with torch.inference_mode():
        [(empty, loss)] = [[score[0] for score in core.score(model, [Prompt(rows, [(3, 3), (3, 4)])])[0]]]
        assert math.isinf(empty) and math.isfinite(loss)
        everything_empty = core.score(model, [Prompt([[256, 5]] * 2, [(2, 2), (2, 2)])])
    assert everything_empty == [[(math.inf, True), (math.inf, True)]]


def test_batches_hold_every_prompt_once_within_the_budget():
    prompts = random_prompts()
    found = list(core.batches(prompts, 1000))
    assert sorted(i for batch in found for i in batch) == list(range(len(prompts)))
    for batch in found:
        size = sum(len(prompts[i].rows) for i in batch) * max(prompts[i].width for i in batch)
        assert size <= 1000 or len(batch) == 1
    assert prompts[found[0][0]].width == max(prompt.width for prompt in prompts)


@pytest.fixture
def bundle(tmp_path):
    """Three tasks, of which one has no data."""
    data = tmp_path / "eval_data" / "group"
    data.mkdir(parents=True)
    rng = random.Random(0)
    letters = "abcdefgh"
    rows = [{"query": f"{i} is", "choices": list(letters[:4]), "gold": rng.randrange(4)} for i in range(23)]
    (data / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"context": f"{i}", "continuation": rng.choice(letters)} for i in range(9)]
    (data / "lm.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n"
        "- {label: choice, dataset_uri: group/choice.jsonl, num_fewshot: [3], icl_task_type: multiple_choice}\n"
        "- {label: absent, dataset_uri: group/no.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
        "- {label: lm, dataset_uri: group/lm.jsonl, num_fewshot: [2], icl_task_type: language_modeling,"
        ' continuation_delimiter: "->"}\n'
    )
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\nabsent,50\nlm,0\n")
    return tmp_path


def test_the_whole_evaluation(bundle, model, tokenizer):
    heard = []
    result = core.evaluate_core(model, tokenizer, bundle, tell=lambda *news: heard.append(news))
    choice, lm = result.tasks
    assert (choice.label, len(choice.correct), lm.label, len(lm.correct)) == ("choice", 23, "lm", 9)
    assert choice.accuracy == sum(choice.correct) / 23
    assert choice.centered == pytest.approx((choice.accuracy - 0.25) / 0.75)
    assert result.core == pytest.approx((choice.centered + lm.centered) / 2)
    assert result.missing == ["absent"] and result.label == "CORE (2 of 3 tasks)"
    assert json.loads(json.dumps(result.to_dict()))["tasks"]["lm"]["examples"] == 9
    assert [news[0] for news in heard if news[1]] == ["choice", "lm"]
    small = core.evaluate_core(model, tokenizer, bundle, batch_tokens=60)
    assert [task.correct for task in small.tasks] == [task.correct for task in result.tasks]


def test_a_cap_takes_the_first_of_the_shuffled(bundle):
    tasks, _ = core.load_tasks(bundle)
    assert core.load_examples(tasks[0], 5) == core.load_examples(tasks[0])[:5]
    with pytest.raises(UsageError, match="3 shots.*at least 4"):
        core.load_examples(tasks[0], 3)


def test_what_is_not_a_bundle_is_refused(tmp_path, bundle):
    with pytest.raises(NanochatError, match="not an evaluation bundle"):
        core.load_tasks(tmp_path / "nowhere")
    for path in (bundle / "eval_data" / "group").glob("*"):
        path.unlink()
    with pytest.raises(NanochatError, match="none of the 3 tasks"):
        core.load_tasks(bundle)


def test_real_bundle_loads(shared):
    tasks, missing = core.load_tasks(shared / "core")
    assert len(tasks) == 18 and sorted(missing) == ["coqa", "hellaswag", "hellaswag_zeroshot", "squad"]
    for task in tasks:
        examples = core.load_examples(task)
        texts = core.texts_of(task, examples[0], core.shots_for(examples, 0, task.shots))
        assert all(text == text.lstrip() or task.kind != "language_modeling" for text in texts) and len(texts) >= 2
