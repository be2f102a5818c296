"""The workshop behind the page that trains, without the page: what is learned, how long that takes, and its limits."""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from tests.spaces.training import COLOURS, ball

pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")
pytest.importorskip("datasets", reason="training needs datasets (pip install 'hubgen[train]')")

PATIENCE = 400
"""Seconds; the machine may be busy"""


@pytest.fixture(scope="module", autouse=True)
def space() -> Iterator[None]:
    """The folder of the Space, whose modules import each other by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent.parent / "spaces" / "train_lora"))
        yield


@pytest.fixture(scope="module")
def service(space: None) -> Iterator[Any]:
    from hubgen.spaces.kit.service import Service
    from hubgen.spaces.kit.settings import Settings

    service = Service(Settings())
    service.start()
    service.ready.result()
    yield service
    service.close()


@pytest.fixture(scope="module")
def workshops(service: Any) -> Iterator[Callable[..., Any]]:
    """`workshops(steps=5)`: one with these limits, around the one model."""
    from steps.workshop import Workshop

    opened = []

    def opening(**limits: int) -> Any:
        settings = replace(service.settings, limits=replace(service.settings.limits, **limits))
        around = SimpleNamespace(settings=settings, model=service.model, thread=service.thread, ready=service.ready)
        opened.append(Workshop(around))  # type: ignore[arg-type]
        return opened[-1]

    yield opening
    for one in opened:
        one.close()


def visitor(workshop: Any, name: str = "visitor") -> Any:
    """The bench of somebody with six balls."""
    bench = workshop.benches.get(name)
    bench.add([(f"{colour}-ball.png", ball(colour)) for colour in COLOURS], workshop.limits)
    return bench


def wait(reached: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: None) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := reached()):
        assert time.monotonic() < end
        meanwhile()
        time.sleep(0.05)
    return found


def ended(run: Any) -> bool:
    return run.state in ("stopped", "done", "failed")


# ---- a subject, and how long it takes ----


@dataclass
class Subject:
    """A subject that was taught."""

    workshop: Any
    bench: Any
    run: Any
    wish: Any
    guess: float
    """The estimate before it"""
    steps_guessed: list[float]
    """What was estimated for its steps alone, meanwhile"""
    wall: float
    cpu: float


@pytest.fixture(scope="module")
def subject(workshops: Callable[..., Any]) -> Subject:
    """Taught from six pictures beside those of its class; the workshop has seen no training before."""
    workshop = workshops()
    bench = visitor(workshop)
    asked = ("subject", "a zog ball", "a ball", ["a caption"] * 6, 32, 2, None, "a zog ball on a hill")
    wish = workshop.wish(bench, *asked)
    measure(workshop)
    guess, guessed, begun, cpu = workshop.estimate(bench, wish), [], time.monotonic(), cpu_of_children()
    run = workshop.start(bench, *asked)

    def again() -> None:  # the machine may be busy now and not then
        if run.state == "running" and run.seen().step:
            measure(workshop)
            guessed.append(steps_alone(workshop, bench, wish))
            time.sleep(0.5)

    wait(lambda: ended(run), again)
    wall = time.monotonic() - begun
    assert run.state == "done", run.tail()
    return Subject(workshop, bench, run, wish, guess, guessed, wall, cpu_of_children() - cpu)


def measure(workshop: Any) -> None:
    workshop.measure()
    workshop.service.thread.submit(lambda: None).result()


def steps_alone(workshop: Any, bench: Any, wish: Any) -> float:
    """Of an estimate, what the steps take."""
    half = replace(wish, steps=wish.steps // 2)
    return 2 * (workshop.estimate(bench, wish) - workshop.estimate(bench, half))


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_subject_is_taught_by_its_words_beside_pictures_of_its_class(subject: Subject) -> None:
    run = subject.run
    rows = [json.loads(line) for line in (run.folder / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a zog ball"] * 6
    classes = run.out / "class_pictures"
    assert len(list(classes.glob("*.png"))) == 32 and "a zog ball" not in (classes / "metadata.jsonl").read_text()
    assert all(row["prior_loss"] > 0 for row in run.rows() if "loss" in row)
    assert [len(pictures) for _, pictures in run.seen().grids] == [1, 1, 1]
    card = (subject.workshop.result(subject.bench) / "README.md").read_text()
    assert "train_dreambooth" in card and "prompt: a zog ball" in card and "a caption" not in card


def test_a_bar_of_as_many_class_pictures_as_steps_is_not_taken_for_steps(subject: Subject) -> None:
    run = subject.run
    assert run.done_steps() == run.steps == 32
    log = run.log.read_text()
    before = log[: log.index("training:")]
    assert "32/32 [" in before
    run.log.write_text(before)
    assert run.done_steps() == 0
    run.log.write_text(log)


def test_the_estimate_is_within_a_factor_of_two_of_what_a_training_takes(subject: Subject) -> None:
    """Where others use the machine too, between the time on the CPU and that on the clock."""
    assert subject.cpu / 2 < subject.guess < 2 * subject.wall
    rows = [row for row in subject.run.rows() if "images_per_second" in row]
    taken = subject.wish.steps * subject.run.settings.run.batch_size / median(row["images_per_second"] for row in rows)
    assert taken / 2 < median(subject.steps_guessed) < 2 * taken


def test_the_next_estimate_is_what_the_last_training_took(subject: Subject) -> None:
    workshop, bench, wish = subject.workshop, subject.bench, subject.wish
    workshop.call_seconds = 0.001  # what drawing takes counts as much before as after
    assert math.isclose(workshop.estimate(bench, wish), subject.run.seconds)
    assert subject.wall / 2 < subject.run.seconds < subject.wall
    style = workshop.wish(bench, "style", "zog", "", [], wish.steps, 2)
    # Its steps are without the pictures of a class.
    assert math.isclose(2 * steps_alone(workshop, bench, style), steps_alone(workshop, bench, wish))


# ---- limits ----


def test_a_training_that_would_take_too_long_is_refused_before_it_begins(workshops: Callable[..., Any]) -> None:
    import gradio as gr

    from hubgen.spaces.kit.limits import Refused
    from steps.learn import Learn

    workshop = workshops(training_seconds=10)
    bench = visitor(workshop)
    workshop.call_seconds = 0.01
    says = r"That would take \d+ minutes; a training may take 10 seconds\. Choose fewer steps\."
    with pytest.raises(Refused, match=says):
        workshop.start(bench, "style", "zog", "", [], 2000)
    assert bench.run is None and list(bench.folder.iterdir()) == []

    with gr.Blocks():
        learn = Learn(workshop)
    request: Any = SimpleNamespace(session_hash="visitor")
    plan, _, button, _ = learn.check(request, "style", "zog", "", 2000, 1, 1e-3, "")
    assert "Choose fewer steps." in plan and button.interactive is False
    workshop.call_seconds = 0.0001
    plan, _, button, _ = learn.check(request, "style", "zog", "", 5, 1, 1e-3, "")
    assert "takes about 10 seconds. It is stopped after 10 seconds" in plan and button.interactive is True


def test_a_training_whose_time_is_over_while_it_starts_leaves_nothing_to_take(workshops: Callable[..., Any]) -> None:
    from hubgen.spaces.kit.limits import Refused

    workshop = workshops()
    bench = visitor(workshop)
    run = workshop.start(bench, "style", "zog", "", [], 2000)
    wait(lambda: run.state == "running")
    run.begun -= 3601
    wait(lambda: ended(run))
    seen = run.seen()
    assert seen.text == "It ran for 60 minutes, and a training may take 60 minutes. Nothing had been learned by then."
    assert seen.state == "stopped" and not seen.goes_on and not seen.saved
    with pytest.raises(Refused, match="It ran for 60 minutes, .* Train anew."):
        workshop.trainings.go_on(bench)
    with pytest.raises(Refused, match="ended before anything was learned"):
        workshop.trainings.go_on(bench, as_it_is=True)

    anew = workshop.start(bench, "style", "zog", "", [], 2000)
    assert [path.name for path in bench.folder.iterdir()] == [anew.number] != [run.number]


def test_what_a_training_has_saved_is_taken_as_it_is_when_its_limits_are_used_up(
    workshops: Callable[..., Any],
) -> None:
    from safetensors.torch import load_file

    import hubgen.spaces.kit.limits as limits

    workshop = workshops(session_bytes=100_000_000)
    bench = visitor(workshop)
    run = workshop.start(bench, "style", "zog", "", [], 2000, 1)
    wait(lambda: run.seen().step)
    with (run.out / "large").open("wb") as file:
        file.truncate(123_000_000)
    wait(lambda: ended(run))
    seen = run.seen()
    assert seen.state == "stopped" and 0 < seen.saved == seen.step < 2000 and not seen.goes_on
    assert seen.text.startswith("Its files take 12") and f"may take 100.0 MB. {seen.saved} of 2000 steps" in seen.text
    with pytest.raises(limits.Refused, match="may take 100.0 MB. Take what it has learned so far."):
        workshop.trainings.go_on(bench)

    run.spent += 3600  # the time is over too, and it came at the last step
    run.wish = replace(run.wish, steps=seen.saved)
    assert run.excess().startswith("It ran for 6")
    workshop.trainings.go_on(bench, as_it_is=True)
    wait(lambda: ended(run))
    done = run.seen()
    assert done.state == "done", run.tail()
    assert (done.step, done.text) == (seen.saved, f"Done: {seen.saved} steps.")
    card = (workshop.result(bench) / "README.md").read_text()
    assert f"max_train_steps: {seen.saved}" in card
    adapter = load_file(workshop.files(bench)["LoRA, for diffusers and hubgen"])
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name), "it has learned"

    # One for which there is no room takes nothing from what they have.
    workshop.limits = replace(workshop.limits, session_bytes=400_000)
    with pytest.raises(limits.Refused, match=r"writes about \d+\.\d MB, and there is room for 400 kB; a smaller rank"):
        workshop.start(bench, "style", "zog", "", [], 2000, 64)
    assert workshop.result(bench).is_dir() and bench.run is run
    assert [path.name for path in bench.folder.iterdir()] == [run.number]


def test_who_has_left_is_stopped_and_leaves_nothing(service: Any, tmp_path: Path) -> None:
    """The queue itself, with scripts that run: one trains, one waits, and a third is told that it is full."""
    from hubgen.spaces.kit.limits import Limits, Refused
    from steps.bench import Benches
    from steps.recipe import checked_wish, settings_for, usual_for
    from steps.runs import Trainings

    model, limits = service.model, Limits(trainings_waiting=1, away_seconds=60)
    benches = Benches(tmp_path / "benches", 64, limits)
    trainings = Trainings(benches, "cpu")
    runs = []
    for name in ("first", "second"):
        bench = benches.get(name)
        bench.add([(f"{colour}.png", ball(colour)) for colour in COLOURS], limits)
        wish = checked_wish(bench, limits, usual_for(model, 6), "style", "zog")
        folder = bench.folder / "run"
        runs.append(trainings.start(bench, wish, folder, *settings_for(wish, bench, model, limits, folder)))
        end = time.monotonic() + 20
        while trainings.running is None and time.monotonic() < end:
            time.sleep(0.1)
    first, second = runs
    process = first.process
    assert first.state == "running" and process is not None and second.state == "waiting" and second.place == 2
    with pytest.raises(Refused, match="waiting already"):
        trainings.check_room(benches.get("third"))
    with pytest.raises(Refused, match="stop it first"):
        trainings.check_room(first.bench)
    assert benches.find("another") is None and len({one.folder for one in benches.of.values()}) == 3

    for bench in benches.of.values():
        bench.seen -= 61
    end = time.monotonic() + 20
    while any(benches.folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(benches.folder.iterdir()) and not benches.of
    assert process.poll() is not None and trainings.running is None and not trainings.waiting
    trainings.close()
