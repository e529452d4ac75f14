"""Rows steered by a table inside the uncut graph, held to rows that the hook steers by itself."""

from contextlib import closing

import numpy as np
import pytest
from exactness import same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routers import router_for

from pysteer import HookedLlama, SteeringPack, SteeringVector
from pysteer.llama.batch import EVERY_ROW, LAST_ROW, NO_ROW, DecodeBatch
from pysteer.pack.operators import Operator
from pysteer.pack.policy import Policy
from pysteer.runtime.plan import PlanCompiler

ARGUMENTS = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "verbose": False}
N_SEQUENCES = 16
TOKENS = np.random.default_rng(2).integers(3, 300, 64).tolist()
LETTERS = "abcdefghijklmnop"


def directions(layers, seed, width, **options):
    rng = np.random.default_rng(seed)
    return SteeringVector(
        {layer: 0.3 * rng.standard_normal(width).astype(np.float32) for layer in layers}, **options
    )


def make_pack(llm):
    """Return categories for the tables, and three that a table cannot express."""
    n, width = llm.n_layer, llm.n_embd()
    vectors = {
        name: directions(range(1 + k % 2, n - k % 2), k, width) for k, name in enumerate(LETTERS)
    }
    vectors["ablated"] = directions([n - 2], 99, width, operator=Operator("ablate"))
    vectors["first"] = directions([0], 98, width)
    vectors["everywhere"] = directions(range(n), 97, width)
    return SteeringPack(vectors)


class Run:
    """A model whose sequences are steered by plans of one injection."""

    def __init__(self, path, injection, pack=None, **arguments):
        self.llm = HookedLlama(path, max_sequences=N_SEQUENCES, **{**ARGUMENTS, **arguments})
        llm = self.llm
        pack = pack or make_pack(llm)
        self.compiler = PlanCompiler(
            pack, None, n_layer=llm.n_layer, n_embd=llm.n_embd(), injection=injection
        )
        self.positions = [0] * N_SEQUENCES
        self.batch = DecodeBatch(ARGUMENTS["n_batch"])

    def close(self):
        self.llm.close()

    def steer(self, slot, steering, scope="all"):
        plan = self.compiler.compile(steering, Policy(scope=scope) if steering else None)
        self.llm.context.set_sequence(slot, plan.start(4, [], ARGUMENTS["n_ctx"]))

    def remove(self, slot):
        self.llm.context.memory.cut(slot, 0)
        self.positions[slot] = 0

    def decode(self, counts, outputs=LAST_ROW):
        """Decode the next tokens of sequences, {slot: count}; return the logits, and the cuts."""
        self.batch.clear()
        rows = []
        for slot, count in counts.items():
            at = self.positions[slot]
            tokens = [TOKENS[(slot + at + k) % len(TOKENS)] for k in range(count)]
            rows.append(self.batch.add(slot, at, tokens, outputs))
            self.positions[slot] += count
        context = self.llm.context
        context.decode(self.batch)
        if outputs == NO_ROW:
            return np.zeros(0, np.float32), context.cuts
        return np.stack([context.logits(row).copy() for row in rows]), context.cuts


def test_sixteen_sequences_with_sixteen_steerings_cut_nothing(tiny_model):
    path = tiny_model("llama")
    with closing(Run(path, "auto")) as tables, closing(Run(path, "hooked")) as hooked:
        for run in (tables, hooked):
            for slot, name in enumerate(LETTERS):
                run.steer(slot, None if slot % 5 == 4 else {name: 1.0 + slot / 8})
        for count in (4, 1, 1):
            counts = dict.fromkeys(range(N_SEQUENCES), count)
            (found, cuts), (expected, hooked_cuts) = tables.decode(counts), hooked.decode(counts)
            assert same_bits(found, expected)
            assert cuts == 0
            assert hooked_cuts > 0


SCOPES = ("all", "prompt", "response", "range 2 20", "linear 6", "first 3")


@st.composite
def moves(draw):
    kind = draw(st.sampled_from(["steer", "steer", "decode", "decode", "decode", "remove"]))
    slots = st.integers(0, 5)
    if kind == "steer":
        names = st.sampled_from([*LETTERS[:5], *LETTERS[:5], "ablated", "first", "everywhere"])
        strengths = st.dictionaries(names, st.sampled_from([0.5, -1.0, 1.5]), max_size=2)
        return kind, draw(slots), draw(st.none() | strengths), draw(st.sampled_from(SCOPES))
    if kind == "remove":
        return kind, draw(slots)
    counts = st.dictionaries(slots, st.sampled_from([1, 1, 2, 9]), min_size=1, max_size=5)
    return kind, draw(counts), draw(st.sampled_from([LAST_ROW, EVERY_ROW, NO_ROW]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gemma3n"])
def test_rows_under_any_plans_equal_hooked_rows(tiny_model, family):
    """Sequences join, leave and change their steering while llama.cpp reuses graphs."""
    path = tiny_model(family)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(moves(), min_size=4, max_size=16))
    def check(steps):
        for run in runs:
            for slot in range(N_SEQUENCES):
                run.steer(slot, None)
                run.remove(slot)
        for kind, *rest in steps:
            if kind != "decode":
                for run in runs:
                    getattr(run, kind)(*rest)
            elif max(runs[0].positions) < 70:
                (found, _), (expected, _) = (run.decode(*rest) for run in runs)
                assert same_bits(found, expected)

    with closing(Run(path, "auto")) as tables, closing(Run(path, "hooked")) as hooked:
        runs = (tables, hooked)
        check()


def test_graph_is_given_back_when_steering_ends(tiny_model):
    """llama.cpp keeps the graph of a decode of equal size, with the nodes that were changed."""
    path = tiny_model("llama")
    with closing(Run(path, "auto")) as run, closing(Run(path, "auto")) as never:
        run.decode({0: 4, 1: 4})
        never.decode({0: 4, 1: 4})
        for _ in range(3):
            run.steer(0, {"a": 1.0})
            run.decode({0: 1, 1: 1})
            run.steer(0, None)
            run.llm.context.memory.cut(0, run.positions[0] - 1)
            run.llm.context.memory.cut(1, run.positions[1] - 1)
            run.positions[:2] = [position - 1 for position in run.positions[:2]]
            assert same_bits(run.decode({0: 1, 1: 1})[0], never.decode({0: 1, 1: 1})[0])


def test_graph_is_given_back_to_the_control_vector(tiny_model):
    """All rows alike go through llama.cpp's own control vector, over nodes that were changed."""
    path = tiny_model("llama")
    with closing(Run(path, "auto")) as run, closing(Run(path, "hooked")) as hooked:
        for kind in ({"a": 1.0}, {"b": 1.0}, {"a": 1.0}, {"b": 1.0}):
            for each in (run, hooked):
                each.steer(0, {"a": 1.0})
                each.steer(1, kind)
            assert same_bits(run.decode({0: 2, 1: 2})[0], hooked.decode({0: 2, 1: 2})[0])


def test_more_steerings_than_a_table_has_rows_are_cut_and_equal(tiny_model):
    """Each of 200 rows gets its own factor."""
    path = tiny_model("llama")
    arguments = {"n_batch": 200, "n_ubatch": 200}
    with (
        closing(Run(path, "auto", **arguments)) as tables,
        closing(Run(path, "hooked", **arguments)) as hooked,
    ):
        logits = []
        for run in (tables, hooked):
            run.batch = DecodeBatch(200)
            run.steer(0, {"a": 1.0}, "linear 250")
            logits.append((run.decode({0: 200}), run.decode({0: 1})))
        assert same_bits(logits[0][0][0], logits[1][0][0])
        assert same_bits(logits[0][1][0], logits[1][1][0])
        assert logits[0][0][1] > 0
        assert logits[0][1][1] == 0


def test_table_forgets_steerings_that_no_row_needs(tiny_model):
    """300 steerings one after the other, with one that stays."""
    path = tiny_model("llama")
    with closing(Run(path, "auto")) as tables, closing(Run(path, "hooked")) as hooked:
        for k in range(300):
            logits = []
            for run in (tables, hooked):
                if k % 60 == 0:
                    run.remove(0)
                    run.remove(1)
                run.steer(0, {"a": 1.0})
                run.steer(1, {"b": 0.01 * (k + 1)})
                found, cuts = run.decode({0: 1, 1: 1})
                logits.append(found)
                assert run is hooked or cuts == 0
            assert same_bits(*logits)


def test_gate_decides_before_later_layers_choose_their_rows(tiny_model):
    path = tiny_model("llama")
    prompts = {"a": [*range(10, 22)], "": [*range(40, 52)]}
    router = router_for(path, prompts)
    steered = []
    for injection in ("auto", "hooked"):
        with closing(HookedLlama(path, max_sequences=2, **ARGUMENTS)) as llm:
            vector = directions([1, 2, 3], 1, llm.n_embd())
            pack = SteeringPack({"a": vector}, router=router, policy=Policy(gate="probe"))
            compiler = PlanCompiler(
                pack, None, n_layer=llm.n_layer, n_embd=llm.n_embd(), injection=injection
            )
            plan = compiler.compile("auto")
            batch = DecodeBatch(64)
            rows = []
            for slot, prompt in enumerate(prompts.values()):
                n = len(prompt)
                spans = [(0, n)] * len(router.reads)
                sequence = plan.start(n, spans, 512)
                llm.context.set_sequence(slot, sequence)
                rows.append(batch.add(slot, 0, prompt))
            llm.context.decode(batch)
            logits = [llm.context.logits(row).copy() for row in rows]
            assert llm.context.cuts > 0
            batch.clear()
            ends = enumerate(map(len, prompts.values()))
            rows = [batch.add(slot, n, [7]) for slot, n in ends]
            llm.context.decode(batch)
            assert (llm.context.cuts == 0) is (injection == "auto")
            logits += [llm.context.logits(row).copy() for row in rows]
            steered.append(np.stack(logits))
    assert same_bits(*steered)


def test_gate_reads_rows_before_they_are_steered_at_its_place(tiny_model):
    """A table would steer them first."""
    path = tiny_model("llama")
    prompts = {"a": [*range(10, 22)], "": [*range(40, 52)]}
    router = router_for(path, prompts)
    policy = Policy(gate="probe")
    scores = []
    for strength in (0.0, 5.0):
        with closing(HookedLlama(path, max_sequences=2, **ARGUMENTS)) as llm:
            n_layer, width = llm.n_layer, llm.n_embd()
            vectors = {"a": directions([2], 1, width), "forced": directions([1], 2, width)}
            pack = SteeringPack(vectors, router=router, policy=policy)
            compiler = PlanCompiler(pack, None, n_layer=n_layer, n_embd=width)
            prompt = prompts["a"]
            plan = compiler.compile({"a": "auto", "forced": strength})
            sequence = plan.start(len(prompt), [(0, len(prompt))] * len(router.reads), 512)
            llm.context.set_sequence(0, sequence)
            batch = DecodeBatch(64)
            batch.add(0, 0, prompt)
            llm.context.decode(batch)
            scores.append(sequence.scores.copy())
    assert np.array_equal(*scores)
