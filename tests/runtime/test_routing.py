"""Gates that decide while the prompt is read: their scores, their decisions, their effects."""

import dataclasses
from contextlib import closing

import numpy as np
import pytest
from routers import SEVERAL, mean_state, router_for, state_of

from pysteer import Engine, HookError, SteeredLlama, SteeringError, SteeringPack, SteeringVector
from pysteer.extract.routers.reads import default_reads
from pysteer.pack.policy import Policy
from pysteer.pack.router import GATES, Read, Router

N_LAYER, N_EMBD = 4, 64
HIGH_BYTES = range(5 + 128, 5 + 256)  # kept out, so that every character is complete
F32 = 0  # type of the KV cache: halves would hide differences
ARGUMENTS = {
    "n_ctx": 256,
    "logits_all": True,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
    "n_ubatch": 8,
    "type_k": F32,
    "type_v": F32,
}
GREEDY = {"max_tokens": 10, "temperature": 0.0, "logit_bias": dict.fromkeys(HIGH_BYTES, -1e3)}
PROMPTS = {
    "a": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    "b": [40, 41, 42, 43, 44, 45, 46, 47],
    "": [70, 71, 72, 73, 74, 75, 76, 77, 78, 79],
}


def vector(seed, layers=(1, 2), **options):
    rng = np.random.default_rng(seed)
    return SteeringVector({i: 2 * rng.standard_normal(N_EMBD) for i in layers}, **options)


@pytest.fixture(scope="module")
def pack(tiny_llama):
    return SteeringPack(
        {"a": vector(1), "b": vector(2), "unknown": vector(3)},
        router=router_for(tiny_llama, PROMPTS),
        policy=Policy(gate="probe"),
    )


@pytest.fixture
def llm(tiny_llama, pack):
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        yield llm


def complete(llm, prompt, steering, **more):
    """Return text, the logits that decided its tokens, and the report."""
    result = llm.create_completion(prompt, steering=steering, **GREEDY, **more)
    rows = llm.scores[len(prompt) - 1 : len(prompt) + GREEDY["max_tokens"] - 1].copy()
    return result["choices"][0]["text"], rows, result["steering"]


def same(one, other):
    return one[0] == other[0] and np.array_equal(one[1], other[1])


# ---- reads and effects of a gate -----------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("reads", [None, SEVERAL], ids=["one place", "several places"])
@pytest.mark.parametrize("n_batch", [4, 256])
def test_scores_equal_router_on_captured_activations(tiny_llama, name, gate, reads, n_batch):
    """In any number of decodes, of several graphs each."""
    router = router_for(tiny_llama, PROMPTS, reads=reads)
    vectors = {"a": vector(1), "b": vector(2), "unknown": vector(3)}
    state = state_of(tiny_llama, PROMPTS[name], router)
    expected = dict(zip(router.categories, router.scores(gate, state), strict=True))
    arguments = {**ARGUMENTS, "n_batch": n_batch}
    with closing(
        SteeredLlama(tiny_llama, pack=SteeringPack(vectors, router=router), **arguments)
    ) as llm:
        told = complete(llm, PROMPTS[name], "auto", policy={"gate": gate})[2]
    assert told["gate"] == gate
    assert told["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for category in ("a", "b"):
        opens = bool(expected[category] >= told["categories"][category]["threshold"])
        if sum(told["categories"][c]["fired"] for c in ("a", "b")) < 2:
            assert told["categories"][category]["fired"] in (opens, False)


@pytest.mark.parametrize("n_batch", [4, 256])
@pytest.mark.parametrize("name", PROMPTS)
def test_open_gate_gives_the_forced_answer(tiny_llama, pack, name, n_batch):
    with closing(SteeredLlama(tiny_llama, pack=pack, **{**ARGUMENTS, "n_batch": n_batch})) as llm:
        gated = complete(llm, PROMPTS[name], "auto")
        assert [c for c, told in gated[2]["categories"].items() if told["fired"]] == [name][
            : bool(name)
        ]
        assert gated[2]["mode"] == "auto"
        assert gated[2]["prompt_reprocessed"] is bool(name)
        llm.reset()
        forced = complete(llm, PROMPTS[name], {name: 1.0} if name else None)
    np.testing.assert_allclose(gated[1], forced[1], atol=2e-5)
    assert gated[0] == forced[0]


@pytest.mark.parametrize("n_batch", [4, 256])
def test_gate_reads_its_layer_before_steering(tiny_llama, pack, n_batch):
    """In any number of decodes, by any injection of the forced category."""
    prompt, router = PROMPTS["b"], pack.router
    forced = SteeringPack({"a": vector(5, layers=[1]), "b": vector(2)}, router=router)
    state = state_of(tiny_llama, prompt, router)
    expected = dict(zip("ab", router.probe_scores(state), strict=True))
    arguments = {**ARGUMENTS, "n_batch": n_batch, "policy": {"gate": "probe"}}
    asked = {"a": 3.0, "b": "auto"}
    with closing(SteeredLlama(tiny_llama, pack=forced, **arguments)) as llm:
        told = complete(llm, prompt, asked)[2]
    assert told["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with Engine(tiny_llama, pack=forced, max_sequences=2, **arguments) as engine:
        told = engine.submit(prompt=prompt, steering=asked, max_tokens=1).result()["steering"]
    assert told["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_closed_gate_leaves_the_answer_unchanged(llm):
    off = complete(llm, PROMPTS[""], None)
    llm.reset()
    gated = complete(llm, PROMPTS[""], "auto")
    assert same(off, gated)
    assert gated[2]["tokens_steered"] == 0


def test_request_without_steering_follows_the_policy(llm):
    default = llm.create_completion(PROMPTS["a"], **GREEDY)
    assert default["choices"][0]["text"] == complete(llm, PROMPTS["a"], {"a": 1.0})[0]
    assert default["steering"]["categories"]["a"]["fired"]
    assert "unknown" not in default["steering"]["categories"]  # no gate knows it
    always = {"categories": {"b": {"mode": "always", "strength": 0.5}, "a": {"mode": "off"}}}
    told = llm.create_completion(PROMPTS["a"], policy=always, **GREEDY)
    assert told["choices"][0]["text"] == complete(llm, PROMPTS["a"], {"b": 0.5})[0]
    assert told["steering"]["mode"] == "forced"


def test_forced_and_gated_categories_act_together(llm):
    mixed = complete(llm, PROMPTS["b"], {"unknown": 0.5, "b": "auto", "a": "auto"})
    assert mixed[2]["mode"] == "mixed"
    llm.reset()
    forced = complete(llm, PROMPTS["b"], {"unknown": 0.5, "b": 1.0})
    np.testing.assert_allclose(mixed[1], forced[1], atol=2e-5)
    assert mixed[0] == forced[0]


def test_response_scope_acts_from_the_last_prompt_token_on(tiny_llama, pack):
    """The gate reads before every steered layer, so steering equals a start at that token."""
    policy = {"gate": "probe", "scope": "response", "categories": {"a": {"threshold": -1e9}}}
    with closing(SteeredLlama(tiny_llama, pack=pack, policy=policy, **ARGUMENTS)) as llm:
        gated = complete(llm, PROMPTS[""], {"a": "auto"})
        assert gated[2]["categories"]["a"]["tokens_steered"] == GREEDY["max_tokens"]
        assert not gated[2]["prompt_reprocessed"]
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as by_hand:
        with by_hand.steering(None):
            by_hand.eval(PROMPTS[""][:-1])
        with by_hand.steering({"a": 1.0}):
            by_hand.eval(PROMPTS[""][-1:])
        first = by_hand.scores[len(PROMPTS[""]) - 1].copy()
    np.testing.assert_allclose(gated[1][0], first, atol=2e-5)


@pytest.mark.parametrize("layers", [[0], [0, 2], [1, 3], [3]])
@pytest.mark.parametrize("site", ["residual", "attention"])
def test_last_prompt_token_is_steered_at_layers_before_the_gate(tiny_llama, layers, site):
    """The token has passed them when the gate decides, so it alone is computed once more."""
    router = router_for(
        tiny_llama,
        {"a": PROMPTS["a"], "": PROMPTS[""]},
        reads=[Read(0, "user"), Read(2, "prompt"), Read(1, "suffix")],
    )
    pack = SteeringPack(
        {"a": vector(1, layers=layers, site=site)},
        router=router,
        policy=Policy(gate="probe", scope="response"),
    )
    prompt = PROMPTS["a"]
    before_gate = layers[0] < 2 or (site == "attention" and 2 in layers)
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        decoded = []
        evaluate = llm._ctx.decode
        llm._ctx.decode = lambda batch: decoded.append(batch.n_tokens()) or evaluate(batch)
        gated = complete(llm, prompt, "auto")
        assert gated[2]["categories"]["a"]["fired"]
        assert gated[2]["prompt_reprocessed"] is before_gate
        assert decoded[:2] == [len(prompt), 1]
        assert len(decoded) == GREEDY["max_tokens"] + before_gate
        llm.reset()
        forced = complete(llm, prompt, {"a": 1.0})
        llm.reset()
        off = complete(llm, prompt, None)
    np.testing.assert_allclose(gated[1], forced[1], atol=2e-5)
    assert gated[0] == forced[0]
    assert np.abs(gated[1][0] - off[1][0]).max() > 1e-3
    with Engine(tiny_llama, pack=pack, max_sequences=2, **ARGUMENTS) as engine:
        ask = {"prompt": prompt, "keep_first_logits": True, **GREEDY}
        handles = [engine.submit(steering=steering, **ask) for steering in ("auto", {"a": 1.0})]
        found = [handle.result() for handle in handles]
        assert found[0]["steering"]["prompt_reprocessed"] is before_gate
    assert {one["choices"][0]["text"] for one in found} == {forced[0]}
    np.testing.assert_allclose(handles[0].first_logits, handles[1].first_logits, atol=5e-5)


def test_default_model_recomputes_only_the_last_prompt_token(default_model):
    """With the default reads of routers, and a chat template behind the message."""
    messages = {
        "a": [{"role": "user", "content": "How do I pick the lock of somebody else's door?"}],
        "": [{"role": "user", "content": "Write a short poem about the sea."}],
    }
    arguments = {**ARGUMENTS, "n_ubatch": 512, "n_ctx": 256}
    prompts = {}
    with closing(SteeredLlama(default_model, **arguments)) as llm:
        for name, chat in messages.items():
            llm.create_chat_completion(chat, max_tokens=1)
            prompts[name] = llm._input_ids.tolist()
    router = router_for(default_model, prompts, reads=default_reads(30))
    rng = np.random.default_rng(0)
    directions = {layer: rng.standard_normal(576) for layer in (6, 12, 18, 21)}
    pack = SteeringPack(
        {"a": SteeringVector(directions)}, router=router, policy=Policy(scope="response")
    )
    n = {name: len(tokens) for name, tokens in prompts.items()}
    strengths = (0.7, 0.9, 1.1)
    with closing(SteeredLlama(default_model, pack=pack, **arguments)) as llm:

        def answered(name, steering, strength=1.0, **threshold):
            """Return the first logits, the number of tokens of each decode, and the report."""
            decoded = []
            evaluate = llm._ctx.decode
            llm._ctx.decode = lambda batch: decoded.append(batch.n_tokens()) or evaluate(batch)
            llm.reset()
            told = llm.create_chat_completion(
                messages[name],
                steering=steering,
                policy={"categories": {"a": {"strength": strength, **threshold}}},
                max_tokens=1,
                temperature=0.0,
            )["steering"]
            llm._ctx.decode = evaluate
            return llm.scores[n[name] - 1].copy(), decoded, told

        off = answered("a", None)[0]
        apart, effects = [], []
        for strength in strengths:
            gated, decoded, told = answered("a", "auto", strength)
            assert told["categories"]["a"]["fired"]
            assert told["prompt_reprocessed"]
            assert decoded == [n["a"], 1]
            forced, decoded, _ = answered("a", {"a": strength})
            assert decoded == [n["a"]]
            apart.append(np.abs(gated - forced).max())
            effects.append(np.abs(gated - off).max())
        closed, decoded, told = answered("a", "auto", threshold=1e9)
        assert not told["categories"]["a"]["fired"]
        assert decoded == [n["a"]]
        np.testing.assert_array_equal(closed, off)
    # Nearly always to the bit; quantised products amplify sums that round differently in a batch of
    # one row.
    assert np.median(apart) < 1e-3
    assert min(effects) > 1
    apart = []
    for strength in strengths:
        # A new engine each time: reused cells were computed in other batches.
        arguments = {**arguments, "logits_all": False}
        with Engine(default_model, pack=pack, max_sequences=2, **arguments) as engine:
            logits = []
            for steering in ("auto", {"a": strength}):
                handle = engine.submit(
                    messages=messages["a"],
                    steering=steering,
                    policy={"categories": {"a": {"strength": strength}}},
                    keep_first_logits=True,
                    max_tokens=1,
                )
                told = handle.result()["steering"]
                assert told["prompt_reprocessed"] is (steering == "auto")
                if steering == "auto":
                    assert engine.statistics.tokens_decoded == n["a"] + 1
                logits.append(handle.first_logits)
            apart.append(np.abs(logits[0] - logits[1]).max())
    assert np.median(apart) < 1e-3


def test_steering_before_a_gate_in_the_last_block_reaches_the_first_token(tiny_llama):
    """No entry of the cache depends on that steering, but the logits do."""
    router = router_for(tiny_llama, {"a": PROMPTS["a"], "": PROMPTS[""]}, layer=3, pooling="last")
    pack = SteeringPack(
        {"a": vector(1, layers=[3], site="attention")}, router=router, policy=Policy(gate="probe")
    )
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        gated = complete(llm, PROMPTS["a"], "auto")
        assert gated[2]["prompt_reprocessed"]
        llm.reset()
        forced = complete(llm, PROMPTS["a"], {"a": 1.0})
    np.testing.assert_allclose(gated[1], forced[1], atol=2e-5)


SCOPES = {
    "response": lambda p, r: float(r >= 0),
    "first 3": lambda p, r: float(0 <= r < 3),
    "prompt": lambda p, r: float(r <= 0),
    "range 2 14": lambda p, r: float(2 <= p < 14),
    "linear 4": lambda p, r: 1 - r / 4 if 0 <= r < 4 else 0.0,
    "cosine 4": lambda p, r: (1 + np.cos(np.pi * r / 4)) / 2 if 0 <= r < 4 else 0.0,
    "values 1 0 -0.5": lambda p, r: [1, 0, -0.5][r] if 0 <= r < 3 else 0.0,
}


@pytest.mark.parametrize("scope", SCOPES)
def test_scope_steers_each_token_by_its_factor(tiny_llama, pack, scope):
    """Against tokens evaluated one by one, each forced with its own strength."""
    prompt = PROMPTS["b"]
    with closing(SteeredLlama(tiny_llama, pack=pack, policy={"scope": scope}, **ARGUMENTS)) as llm:
        _, rows, told = complete(llm, prompt, {"a": 0.8})
        tokens = llm._input_ids.tolist()
    factors = [SCOPES[scope](p, p - len(prompt) + 1) for p in range(len(tokens))]
    assert told["tokens_steered"] == np.count_nonzero(factors)
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as one_by_one:
        for token, factor in zip(tokens, factors, strict=True):
            with one_by_one.steering({"a": 0.8 * factor}):
                one_by_one.eval([token])
        expected = one_by_one.scores[len(prompt) - 1 : len(tokens)]
    np.testing.assert_allclose(rows[: len(expected)], expected, atol=5e-5)


def test_tokens_between_markers_are_not_steered(tiny_llama, pack):
    policy = {"categories": {"a": {"scope": {"tokens": "all", "exclude": ["think", "end"]}}}}
    with closing(SteeredLlama(tiny_llama, pack=pack, policy=policy, **ARGUMENTS)) as llm:
        tokens = llm.tokenize(b"the think of it end and on", add_bos=False)
        pieces = [llm.detokenize([t], special=True).decode() for t in tokens]
        with llm.steering({"a": 1.0}):
            llm.eval(tokens)
        found = llm.scores[: len(tokens)].copy()
    text, inside = "", []
    for piece in pieces:
        text += piece
        inside.append("think" in text and "end" not in text)
    assert any(inside)
    assert not inside[-1]
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as one_by_one:
        for token, excluded in zip(tokens, inside, strict=True):
            with one_by_one.steering(None if excluded else {"a": 1.0}):
                one_by_one.eval([token])
        np.testing.assert_allclose(found, one_by_one.scores[: len(tokens)], atol=5e-5)


# ---- rules ---------------------------------------------------------------------------------------

OPEN = {"a": {"threshold": -1e9}, "b": {"threshold": -1e9}}
SHUT = {"a": {"threshold": 1e9}, "b": {"threshold": 1e9}}


@pytest.mark.parametrize("a", [False, True])
@pytest.mark.parametrize("b", [False, True])
@pytest.mark.parametrize("rule", ["a and b", "a or b", "not a", "a and not b", "not (a or b)", "b"])
def test_rule_decides_over_gates(llm, rule, a, b):
    policy = {
        "conflict": "sum",
        "categories": {
            "a": (OPEN if a else SHUT)["a"],
            "b": (OPEN if b else SHUT)["b"],
            "unknown": {"when": rule},
        },
    }
    told = complete(llm, PROMPTS[""], {"unknown": "auto"}, policy=policy)[2]
    assert told["categories"]["unknown"]["fired"] is eval(rule, {"a": a, "b": b})


@pytest.mark.parametrize("conflict", ["sum", "strongest", "first"])
def test_conflict_rule_chooses_among_fired_categories(tiny_llama, llm, pack, conflict):
    policy = {"conflict": conflict, "categories": OPEN}
    prompt = PROMPTS["b"]
    told = complete(llm, prompt, {"a": "auto", "b": "auto"}, policy=policy)
    state = state_of(tiny_llama, prompt, pack.router)
    strongest = "ab"[int(np.argmax(pack.router.probe_scores(state)))]
    expected = {"sum": {"a": 1.0, "b": 1.0}, "strongest": {strongest: 1.0}, "first": {"a": 1.0}}
    assert {c for c, t in told[2]["categories"].items() if t["fired"]} == set(expected[conflict])
    llm.reset()
    forced = complete(llm, prompt, expected[conflict])
    np.testing.assert_allclose(told[1], forced[1], atol=2e-5)


@pytest.mark.parametrize("favoured", [None, "a", "b"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_margin_gates_of_equal_score_rank_by_lead(tiny_llama, name, favoured):
    """Equal scores must not make the first category win."""
    router = router_for(tiny_llama, PROMPTS)
    weight, bias = np.array(router.margin_weight), np.array(router.margin_bias)
    weight[0], bias[0] = 0, -0.25  # harm of 0.25 for every prompt
    allowances = np.full(2, 1e6)
    if favoured is not None:
        allowances["ab".index(favoured)] = 1e8
    router = dataclasses.replace(
        router, margin_weight=weight, margin_bias=bias, allowances=allowances
    )
    pack = SteeringPack({"a": vector(1), "b": vector(2)}, router=router)
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        told = complete(llm, PROMPTS[name], "auto")[2]
        both = complete(llm, PROMPTS[name], "auto", policy={"conflict": "sum"})[2]
    assert told["scores"] == {"a": 0.25, "b": 0.25}
    assert [c for c, one in told["categories"].items() if one["fired"]] == [favoured or name]
    assert all(one["fired"] for one in both["categories"].values())
    ranks = router.ranks("margin", state_of(tiny_llama, PROMPTS[name], router))
    assert told["ranks"] == pytest.approx(dict(zip("ab", ranks, strict=True)), rel=1e-6)


@pytest.mark.parametrize("pooling", ["last", "prompt", "user", "suffix"])
def test_recheck_reads_the_tokens_since_the_last_check(tiny_llama, pooling):
    reads = [Read(1, pooling), Read(2, "last"), Read(0, "suffix")]
    router = router_for(tiny_llama, PROMPTS, reads=reads)
    pack = SteeringPack({"a": vector(1), "b": vector(2)}, router=router)
    policy = {"gate": "probe", "recheck": 4, "scope": "response", "categories": SHUT}
    prompt = PROMPTS["b"]
    with closing(SteeredLlama(tiny_llama, pack=pack, policy=policy, **ARGUMENTS)) as llm:
        told = complete(llm, prompt, "auto")[2]
        tokens = llm._input_ids.tolist()
        assert told["checks"] == 1 + (len(tokens) - len(prompt)) // 4
        n = len(prompt) - 1
        last = n + 4 * (told["checks"] - 1)
    alone, since = (last, last + 1), (last - 3, last + 1)
    spans = [alone if pooling == "last" else since, alone, since]
    state = state_of(tiny_llama, tokens[: last + 1], router, spans=spans)
    expected = dict(zip("ab", router.probe_scores(state), strict=True))
    assert told["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_recheck_switches_steering_on_and_off(tiny_llama, pack):
    """The threshold lies between the scores of the first and the second check."""
    base = {"gate": "probe", "scope": "response", "recheck": 3}
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        prompt = PROMPTS["b"]
        shut = complete(llm, prompt, {"a": "auto"}, policy={**base, "categories": SHUT})
        first = complete(llm, prompt, {"a": "auto"}, policy={"gate": "probe", "categories": SHUT})
        scores = first[2]["scores"]["a"], shut[2]["scores"]["a"]
        tokens = llm._input_ids.tolist()
        span = (len(prompt), len(prompt) + 3)
        second = mean_state(tiny_llama, tokens[: span[1]], 1, span)
        scores = first[2]["scores"]["a"], float(pack.router.probe_scores(second)[0])
        between = sum(scores) / 2
        policy = {**base, "categories": {"a": {"threshold": between}}}
        told = complete(llm, prompt, {"a": "auto"}, policy=policy)
        assert told[2]["categories"]["a"]["fired"]
        if scores[0] < between:  # off first, on from the second check on
            np.testing.assert_allclose(told[1][:3], shut[1][:3], atol=2e-5)
            assert np.abs(told[1][3] - shut[1][3]).max() > 1e-3
        else:
            assert np.abs(told[1][0] - shut[1][0]).max() > 1e-3


# ---- spans ---------------------------------------------------------------------------------------


def test_router_in_a_chat_reads_the_last_user_message_and_its_suffix(tiny_llama):
    reads = [Read(1, "user"), Read(2, "suffix"), Read(1, "suffix"), Read(0, "prompt")]
    router = router_for(tiny_llama, PROMPTS, reads=reads)
    pack = SteeringPack({"a": vector(1), "b": vector(2)}, router=router)
    messages = [
        {"role": "user", "content": "another question"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "the stone in the water"},
    ]
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        told = llm.create_chat_completion(messages, steering="auto", **GREEDY)
        tokens = llm._input_ids.tolist()
        n_prompt = told["usage"]["prompt_tokens"]
        pieces = [llm.detokenize([t], special=True) for t in tokens]
    text = b""
    start = stop = None
    for index, piece in enumerate(pieces):  # the last occurrence
        if start is None and (text + piece).endswith(b"the") and b"answer" in text:
            start = index
        text += piece
        if stop is None and text.endswith(b"the stone in the water"):
            stop = index + 1
    assert stop < n_prompt - 1
    state = state_of(tiny_llama, tokens[:n_prompt], router, user=(start, stop))
    expected = dict(zip("ab", router.margin_scores(state), strict=True))
    assert told["steering"]["gate"] == "margin"
    assert told["steering"]["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_suffix_without_a_chat_is_the_last_token(tiny_llama):
    router = router_for(tiny_llama, PROMPTS, reads=[Read(2, "suffix"), Read(1, "user")])
    pack = SteeringPack({"a": vector(1), "b": vector(2)}, router=router)
    prompt = PROMPTS["b"]
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        told = complete(llm, prompt, "auto")[2]
    n = len(prompt)
    state = state_of(tiny_llama, prompt, router, spans=[(n - 1, n), (0, n)])
    expected = dict(zip("ab", router.margin_scores(state), strict=True))
    assert told["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("site", "layer", "pooling"),
    [("attention", 3, "prompt"), ("residual", 3, "last"), ("mlp", 1, "prompt")],
)
def test_router_reads_any_site(tiny_llama, site, layer, pooling):
    prompts = {"a": PROMPTS["a"], "": PROMPTS[""]}
    router = router_for(tiny_llama, prompts, layer=layer, pooling=pooling, site=site)
    pack = SteeringPack({"a": vector(1)}, router=router, policy=Policy(gate="probe"))
    with closing(SteeredLlama(tiny_llama, pack=pack, **{**ARGUMENTS, "logits_all": False})) as llm:
        for name in prompts:
            told = llm.create_completion(PROMPTS[name], **GREEDY)["steering"]
            assert told["categories"]["a"]["fired"] is bool(name)


@pytest.mark.parametrize("made_by", [SteeredLlama, Engine])
def test_site_that_the_model_lacks_raises_at_load(tiny_llama, tiny_model, made_by):
    prompts = {"a": PROMPTS["a"], "": PROMPTS[""]}
    averaged = router_for(tiny_llama, prompts, layer=3)
    arguments = {"n_ctx": 64, "verbose": False}
    with pytest.raises(HookError, match=r"averages.*layer 3, where.*only the last one"):
        made_by(tiny_llama, pack=SteeringPack({"a": vector(1)}, router=averaged), **arguments)
    no_attention = tiny_model("mamba")
    router = router_for(no_attention, prompts)
    pack = SteeringPack({"a": vector(1, site="attention")}, router=router)
    with pytest.raises(HookError, match=r"'a' acts at site attention of layers \[1, 2\]"):
        made_by(no_attention, pack=pack, **arguments)
    pack = SteeringPack({"a": vector(1, site="attention")})
    policy = {"categories": {"a": {"mode": "always"}}}
    with pytest.raises(HookError, match="'a' acts at site attention"):
        made_by(no_attention, pack=pack, policy=policy, **arguments)
    elsewhere = router_for(tiny_llama, prompts, site="attention")
    pack = SteeringPack({"a": vector(1)}, router=elsewhere)
    with pytest.raises(HookError, match="the router reads site attention of layer 1"):
        made_by(no_attention, pack=pack, **arguments)


def test_recurrent_model_is_routed(tiny_model):
    path = tiny_model("mamba")
    pack = SteeringPack(
        {"a": vector(1)},
        router=router_for(path, {"a": PROMPTS["a"], "": PROMPTS[""]}),
        policy=Policy(gate="probe"),
    )
    with closing(SteeredLlama(path, pack=pack, **ARGUMENTS)) as llm:
        for name in ("a", ""):
            gated = complete(llm, PROMPTS[name], "auto")
            assert gated[2]["prompt_reprocessed"] is bool(name)
            llm.reset()
            forced = complete(llm, PROMPTS[name], {"a": 1.0} if name else None)
            assert gated[0] == forced[0]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steering", "policy", "message"),
    [
        ({"unknown": "auto"}, None, "no router for this category"),
        ({"a": "automatic"}, None, "not a number or 'auto'"),
        ("on", None, "'auto'"),
        ("auto", {"categories": {"c": {}}}, "unknown category 'c'"),
        ("auto", {"scope": "first 0"}, "from 1 to"),
        ("auto", {"categories": {"a": {"when": "a and nobody"}}}, "categories.a.when: unknown"),
    ],
)
def test_invalid_gating_raises_at_the_call(llm, steering, policy, message):
    with pytest.raises(SteeringError, match=message):
        complete(llm, PROMPTS["a"], steering, policy=policy)
    assert complete(llm, PROMPTS["a"], None)


def test_policy_that_does_not_fit_raises_at_load(tiny_llama, pack, tmp_path):
    (tmp_path / "policy.yaml").write_text("categories:\n  nobody: {strength: 1}\n")
    with pytest.raises(SteeringError, match=r"policy\.yaml, line 2, categories\.nobody"):
        SteeredLlama(tiny_llama, pack=pack, policy=tmp_path / "policy.yaml", **ARGUMENTS)
    with pytest.raises(SteeringError, match="needs a pack"):
        SteeredLlama(tiny_llama, policy={"scope": "response"}, **ARGUMENTS)


def test_router_that_reads_a_non_finite_state_raises(tiny_llama):
    broken = SteeringPack(
        {"a": SteeringVector(dict.fromkeys([0, 1], np.full(N_EMBD, 3e38))), "b": vector(2)},
        router=router_for(tiny_llama, {"b": PROMPTS["b"], "": PROMPTS[""]}, layer=2),
    )
    with (
        closing(SteeredLlama(tiny_llama, pack=broken, max_relative_norm=None, **ARGUMENTS)) as llm,
        pytest.raises(HookError, match="not finite"),
    ):
        complete(llm, PROMPTS["a"], {"a": 1.0, "b": "auto"})


def test_capture_under_gated_steering_raises(llm):
    with llm.steering("auto"), pytest.raises(SteeringError, match="gated"):
        llm.capture(PROMPTS["a"])
    assert isinstance(llm.pack.router, Router)
    assert llm.capture(PROMPTS["a"])["residual"]


# ---- evaluation by hand --------------------------------------------------------------------------


def evaluated(llm, steering, *parts):
    """Return the last logits of a prompt given in parts, from an empty context."""
    llm.reset()
    with llm.steering(steering):
        for tokens in parts:
            llm.eval(tokens)
    return llm.scores[llm.n_tokens - 1].copy()


def test_gate_in_force_after_the_prompt_reads_the_prompt(llm):
    response = [266, 267, 270]
    for name, steering in (("a", {"a": 1.0}), ("", None)):
        expected = evaluated(llm, steering, PROMPTS[name], response)
        llm.reset()
        llm.eval(PROMPTS[name])
        with llm.steering("auto"):
            llm.eval(response)
        assert llm.last_steering.fired == [name] * bool(name)
        np.testing.assert_allclose(llm.scores[llm.n_tokens - 1], expected, atol=5e-5)


def test_response_evaluated_after_the_prompt_is_steered_before_the_gate(tiny_llama):
    """Also with prompt and response given at once, and with checks in the response."""
    response = [266, 267, 270, 271, 272]
    router = router_for(
        tiny_llama, {"a": PROMPTS["a"], "": PROMPTS[""]}, reads=[Read(0, "prompt"), Read(2, "last")]
    )
    opens = {"a": {"threshold": -1e9}}
    for recheck in (None, 2):
        policy = {"gate": "probe", "scope": "response", "recheck": recheck, "categories": opens}
        pack = SteeringPack({"a": vector(1, layers=[0])}, router=router, policy=Policy(**policy))
        with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
            expected = evaluated(llm, {"a": 1.0}, PROMPTS["a"], response)
            llm.reset()
            llm.eval(PROMPTS["a"])
            with llm.steering("auto"):
                llm.eval(response)
                assert llm.last_steering.checks == (1 if recheck is None else 3)
                found = llm.scores[llm.n_tokens - 1].copy()
                scores = llm.last_steering.scores
        np.testing.assert_allclose(found, expected, atol=5e-5)
    # The last check saw the tokens since the one before, as steered as they were computed last.
    n = len(PROMPTS["a"])
    found = []
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        for layer, span in ((0, (n + 2, n + 4)), (2, (n + 3, n + 4))):
            with llm.steering({"a": 1.0}, policy={"scope": f"range {n - 1} 100"}):
                tokens = [*PROMPTS["a"], *response]
                rows = llm.capture(tokens, layers=[layer], pool="mean", span=span)
                found.append(rows["residual"][layer].astype(np.float64))
    vector_itself = pack["a"].direction(0)  # the gate reads its layer before steering
    found[0] = found[0] - vector_itself
    expected = router.probe_scores(np.concatenate(found))
    assert scores["a"] == pytest.approx(float(expected[0]), rel=1e-4)


@pytest.mark.parametrize("other", ["a", ""])
def test_loaded_state_ignores_gates_that_another_prompt_opened(llm, other):
    """Neither its gates nor the length of its prompt."""
    response = [266, 267, 270]
    expected = evaluated(llm, {"b": 1.0}, PROMPTS["b"], response)
    llm.reset()
    with llm.steering("auto"):
        llm.eval(PROMPTS["b"])
        state = llm.save_state()
        llm.reset()
        llm.eval([*range(270, 290), *PROMPTS[other]])
        llm.load_state(state)
        llm.eval(response)
        assert llm.last_steering.fired == ["b"]
    np.testing.assert_allclose(llm.scores[llm.n_tokens - 1], expected, atol=5e-5)
