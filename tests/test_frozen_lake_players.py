"""The scripted players of FrozenLake-Obscure: clean explorers, with and without a memory."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_agent.context import COMPACT, NATURAL, Message, Trajectory, Turn, message, parse_update
from cod_agent.environments.draws import randomness
from cod_agent.environments.frozen_lake import MOVES, PLAYERS, FrozenLake
from cod_agent.environments.frozen_lake.maps import distances, draw_mapping
from cod_agent.environments.frozen_lake.players import noted, options, read_lake
from cod_agent.environments.frozen_lake.world import parse_answer
from cod_agent.errors import UsageError
from cod_agent.tasks import Pack


def numbers(pack: Pack) -> dict[str, int]:
    """The secret of a pack: the direction of each move."""
    names = ("frozen-lake", *(pack.data[key] for key in ("preset", "split", "seed", "pack")), "directions")
    return {move: n for n, move in draw_mapping(randomness(*names)).items()}


def live(pack: Pack, player) -> list[float]:
    """The rewards of a player's life through a pack, by the compact prompts of the runtime."""
    note, rewards = "", []
    for task in pack:
        session = pack.environment.start(task)
        first = seen = session.reset()
        said, turns = COMPACT.solve(task, note, first), []
        while not seen.done:
            answer = player(said)
            seen = session.step(answer)
            turns.append(Turn(answer, seen))
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
        rewards.append(seen.feedback.reward)
        note = parse_update(player(COMPACT.update(task, note, Trajectory(first, tuple(turns)), seen.feedback)), 4000)
    return rewards


def rewards_by_task(preset: str, packs: int) -> dict[str, list[float]]:
    """Each player's mean reward at each of four tasks."""
    lake, means = FrozenLake(preset, 0, form="compact"), {}
    for name, make in PLAYERS.items():
        player = make(Random(0))
        rewards = [live(pack, player) for pack in lake.packs(packs, 4)]
        means[name] = [sum(column) / packs for column in zip(*rewards, strict=True)]
    return means


def test_players_are_told_apart_by_what_they_remember():
    means = rewards_by_task("small", 300)
    perfect, memoryless = means["perfect"], means["memoryless"]
    assert perfect[0] > 0.48 and perfect[1] > 0.83 and perfect[2] > 0.94 and perfect[3] > 0.97
    assert max(memoryless) - min(memoryless) < 0.12


@pytest.mark.parametrize("preset", ["5x5", "6x6"])
def test_players_are_told_apart_on_larger_maps(preset):
    means = rewards_by_task(preset, 100)
    assert means["perfect"][0] < 0.75 and means["perfect"][3] > 0.94
    assert means["memoryless"][3] < 0.75


def test_a_player_who_knows_all_walks_a_shortest_path():
    lake, player = FrozenLake("paper-hard", 1, form="compact"), PLAYERS["perfect"](Random(0))
    for pack in lake.packs(30, 1):
        note = "\n".join(f"{move}: Direction {n}" for move, n in numbers(pack).items())
        session = lake.start(pack[0])
        seen = session.reset()
        size, cells = read_lake(seen.text)
        holes = frozenset(i for i, cell in enumerate(cells) if cell == "#")
        path = distances(size, cells.index("*"), holes)[cells.index("@")]
        said = COMPACT.solve(pack[0], note, seen)
        for _ in range(path):
            answer = player(said)
            seen = session.step(answer)
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
        assert seen.done and seen.feedback.reward == 1.0


def solve_prompt(note: str, *talk: str) -> list[Message]:
    """A prompt with `note`, then observations and answers in turn."""
    said = [message("user", ("framework", f"<context>\n{note}\n</context>\n{talk[0]}"))]
    roles = ("assistant", "user")
    return said + [message(roles[i % 2], ("environment", text)) for i, text in enumerate(talk[1:])]


def test_the_fourth_direction_is_inferred():
    note = "Up: Direction 4\nDown: Direction 1\nLeft: Direction 3"
    assert options(solve_prompt(note, "@.*\n...\n...")) == [("Right", 2)]


def test_a_bump_tells_which_edge_it_was():
    talk = ("...\n@.*\n...", "Right? Direction 2", "blocked: Direction 2\n...\n@.*\n...")
    choices = options(solve_prompt("null", *talk))
    assert {direction for _, direction in choices} == {1, 3, 4}
    talk = ("*..\n@..\n...", "Up? Direction 2", "blocked: Direction 2\n*..\n@..\n...", "Up? Direction 1")
    talk += ("Right: Direction 1\n*..\n.@.\n...",)
    assert options(solve_prompt("null", *talk)) == [("Left", 2)]


def test_what_is_seen_beats_a_wrong_note():
    note = "Right: Direction 1"
    talk = ("...\n@.*\n...", "Right? Direction 1", "Down: Direction 1\n...\n..*\n@..")
    assert all(direction != 1 for _, direction in options(solve_prompt(note, *talk)))


def test_notes_are_written_in_a_fixed_order_and_completed():
    prompt = "Update\n<context>\nLeft: Direction 3\n</context>\n"
    prompt += "blocked: Direction 3\nDown: Direction 1\nUp: Direction 2\ngoal 1"
    assert noted(prompt) == {"Up": 2, "Down": 1, "Left": 3, "Right": 4}
    said = [message("user", ("framework", prompt))]
    expected = "<context>\nUp: Direction 2\nDown: Direction 1\nLeft: Direction 3\nRight: Direction 4\n</context>"
    assert PLAYERS["perfect"](Random(0))(said) == expected
    assert PLAYERS["memoryless"](Random(0))(said) == "<context>\nnull\n</context>"
    nothing = [message("user", ("framework", "Update\n<context>\nnull\n</context>\nblocked: Direction 3\nsteps 0"))]
    assert PLAYERS["perfect"](Random(0))(nothing) == "<context>\nnull\n</context>"


@pytest.mark.parametrize("name", PLAYERS)
def test_players_ask_for_the_compact_form(name):
    lake = FrozenLake("small")
    task = lake.pack(1)[0]
    with pytest.raises(UsageError, match="compact"):
        PLAYERS[name](Random(0))(NATURAL.solve(task, "", lake.start(task).reset()))
    with pytest.raises(UsageError):
        PLAYERS[name](Random(0))([])


@given(st.text(alphabet="UpDownLeft: Direction1234\n<>/context", max_size=80))
def test_players_survive_any_note(note):
    answer = PLAYERS["perfect"](Random(0))(solve_prompt(note.replace("<", ""), "@.*\n...\n..."))
    assert parse_answer(answer, "compact") in (1, 2, 3, 4)
    assert set(noted(f"Update\n<context>\n{note}\n</context>\ngoal 1")) <= set(MOVES)
