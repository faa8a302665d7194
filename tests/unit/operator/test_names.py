"""Which Model an alias belongs to, which fallbacks count, and whom a change affects."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.api.model import Model, decode_model
from kubeai.operator.conditions import Facts, status_of
from kubeai.operator.names import NO_NAMES, Names, ResolvedNames
from kubeai.operator.routes import route_of


def make(name: str, second: int = 0, *, uid: str = "", leaves: bool = False, **spec) -> Model:
    metadata = {
        "name": name,
        "uid": uid or name,
        "creationTimestamp": f"2026-01-01T00:00:{second:02}Z",
    }
    if leaves:
        metadata["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    spec = {"url": "hf://a/b", "engine": "VLLM", "features": [], **spec}
    return decode_model({"metadata": metadata, "spec": spec})


def of(*models: Model) -> Names:
    names = Names()
    names.begin({model.metadata.name: model for model in models})
    return names


def reasons(resolved: ResolvedNames) -> list[str]:
    return [one.reason for one in (*resolved.ignored_aliases, *resolved.ignored_references)]


# -- aliases ---------------------------------------------------------------------------------------


def test_the_older_model_has_an_alias_whatever_the_order_in_which_they_are_seen():
    old, new = make("b", 1, aliases=["x", "y"]), make("a", 2, aliases=["x", "z"])
    for names in (of(old, new), of(new, old)):
        assert names.resolve("b").aliases == ("x", "y")
        assert names.resolve("a").aliases == ("z",)
        (ignored,) = names.resolve("a").ignored_aliases
        assert (
            ignored.message
            == "the alias 'x' is ignored: it belongs to the Model 'b', which is older"
        )


def test_models_of_the_same_second_are_ordered_by_name():
    names = of(make("b", aliases=["x"]), make("a", aliases=["x"]))
    assert (names.resolve("a").aliases, names.resolve("b").aliases) == (("x",), ())


@pytest.mark.parametrize("alias", ["m", "m_fin"])
def test_a_models_name_and_adapters_win_over_an_older_models_alias(alias):
    adapters = [{"name": "fin", "url": "hf://a/b"}]
    names = of(make("old", 1, aliases=[alias, "m_other"]), make("m", 2, adapters=adapters))
    assert names.resolve("old").aliases == ("m_other",)
    assert reasons(names.resolve("old")) == ["Conflict"]


def test_an_alias_that_is_the_models_own_name_is_neither_used_nor_reported():
    assert of(make("m", aliases=["m"])).resolve("m") == ResolvedNames()


def test_an_alias_goes_to_the_next_model_when_its_owner_is_deleted():
    first, second = make("a", 1, aliases=["x"]), make("b", 2, aliases=["x"])
    names = of(first, second)
    assert names.observe("a", make("a", 1, aliases=["x"], leaves=True)) == {"b"}
    assert (names.resolve("a"), names.resolve("b").aliases) == (NO_NAMES, ("x",))
    assert names.observe("a", None) == set()


def test_a_change_names_the_models_that_it_affects():
    names = of(make("a", 1, aliases=["x", "n"]), make("b", 2, aliases=["x"]), make("c", 3))
    assert names.observe("c", make("c", 3, aliases=["y"])) == set()
    assert names.observe("n", make("n", 4)) == {"a"}
    assert names.observe("a", make("a", 1, aliases=["n"])) == {"b"}
    model = make("a", 1, aliases=["n"])
    assert names.observe("a", model) == set(), "nothing that names depend on has changed"
    assert names.observe("a", model) == set()
    assert names.observe("n", None) == {"a"}


# -- references ------------------------------------------------------------------------------------


def test_a_reference_to_the_model_itself_does_not_count():
    names = of(make("m", fallbacks=["m", "b"], canary={"model": "m", "percent": 5}), make("b"))
    resolved = names.resolve("m")
    assert (resolved.fallbacks, resolved.canary) == (("b",), "")
    assert reasons(resolved) == ["SelfReference", "SelfReference"]
    assert resolved.ignored_references[0].message == (
        "fallbacks: 'm' is ignored: it is this Model itself"
    )


def test_a_model_that_does_not_exist_is_reported_and_counts_once_it_does():
    names = of(make("m", fallbacks=["b"]))
    assert names.resolve("m").fallbacks == ("b",)
    assert reasons(names.resolve("m")) == ["NotFound"]
    assert names.observe("b", make("b", 9)) == {"m"}
    assert reasons(names.resolve("m")) == []
    assert names.observe("b", None) == {"m"}


def test_in_a_cycle_the_older_models_entry_counts():
    names = of(make("a", 1, fallbacks=["b"]), make("b", 2, fallbacks=["c"]), make("c", 3))
    assert names.observe("c", make("c", 3, fallbacks=["a", "d"])) == {"a", "b"}
    assert names.resolve("a").fallbacks == ("b",)
    assert names.resolve("b").fallbacks == ("c",)
    assert names.resolve("c").fallbacks == ("d",)
    assert reasons(names.resolve("c")) == ["Cycle", "NotFound"]
    assert names.observe("b", make("b", 2)) == {"a", "c"}
    assert names.resolve("c").fallbacks == ("a", "d")


def test_a_canary_may_fall_back_to_its_model():
    names = of(make("a", 1, canary={"model": "b", "percent": 5}), make("b", 2, fallbacks=["a"]))
    assert names.resolve("a").canary == "b"
    assert names.resolve("b").fallbacks == ("a",)


def test_canaries_of_each_other_are_a_cycle():
    names = of(
        make("a", 1, canary={"model": "b", "percent": 5}),
        make("b", 2, canary={"model": "a", "percent": 5}),
    )
    assert (names.resolve("a").canary, names.resolve("b").canary) == ("b", "")


MODELS = "abcd"
specs = st.fixed_dictionaries(
    {
        "aliases": st.lists(st.sampled_from(["a", "b", "x", "y", "a_f"]), unique=True, max_size=3),
        "fallbacks": st.lists(st.sampled_from(MODELS), unique=True, max_size=3),
        "second": st.integers(0, 2),
        "adapters": st.sampled_from([[], [{"name": "f", "url": "hf://a/b"}]]),
        "gone": st.booleans(),
    }
)


@given(st.lists(st.tuples(st.sampled_from(MODELS), specs), max_size=12))
def test_what_is_not_reported_as_affected_has_not_changed(history):
    names, models = Names(), {}
    for name, spec in history:
        before = {each: names.resolve(each) for each in MODELS}
        gone, second = spec.pop("gone"), spec.pop("second")
        model = None if gone else make(name, second, uid=str(second), **spec)
        spec.update(gone=gone, second=second)
        affected = names.observe(name, model)
        models[name] = model
        for each in set(MODELS) - affected - {name}:
            assert names.resolve(each) == before[each]
    fresh = of(*(model for model in models.values() if model is not None))
    resolved = {each: names.resolve(each) for each in MODELS}
    assert resolved == {each: fresh.resolve(each) for each in MODELS}
    owned = [alias for each in resolved.values() for alias in each.aliases]
    assert len(owned) == len(set(owned)), "an alias belongs to one Model"
    assert not set(owned) & {name for name, model in models.items() if model is not None}
    assert _is_acyclic({name: each.fallbacks for name, each in resolved.items()})


def _is_acyclic(edges: dict[str, tuple[str, ...]]) -> bool:
    left = dict(edges)
    while left:
        ends = [name for name, to in left.items() if not any(one in left for one in to)]
        if not ends:
            return False
        for name in ends:
            del left[name]
    return True


# -- what is published -----------------------------------------------------------------------------


def test_the_route_has_what_counts():
    model = make(
        "m", aliases=["x"], fallbacks=["b"], waitBeforeFallback="1m30s",
        canary={"model": "c", "percent": 7},
    )  # fmt: skip
    route = route_of(model, (), names=of(model, make("b"), make("c")).resolve("m"))
    assert (route.aliases, route.fallbacks) == (("x",), ("b",))
    assert (route.wait_before_fallback_s, route.canary, route.canary_percent) == (90.0, "c", 7)
    assert route_of(make("m"), ()).wait_before_fallback_s == 10.0
    assert route_of(make("m", waitBeforeFallback="0s"), ()).wait_before_fallback_s == 0.0
    assert route_of(make("m", waitBeforeFallback="soon"), ()).wait_before_fallback_s == 10.0


def conditions(model: Model, resolved: ResolvedNames) -> dict[str, tuple[str, str, str]]:
    status = status_of(model, Facts(pods=(), left=(), names=resolved))
    found = {c.type: (c.status, c.reason, c.message) for c in status.conditions}
    return {name: found[name] for name in ("AliasesAccepted", "FallbacksAccepted") if name in found}


def test_conditions_say_which_entries_are_ignored():
    model = make("m", 5, aliases=["x", "y"], fallbacks=["m", "n"])
    other = make("o", 1, aliases=["x"])
    assert conditions(model, of(model, other).resolve("m")) == {
        "AliasesAccepted": (
            "False",
            "Conflict",
            "the alias 'x' is ignored: it belongs to the Model 'o', which is older",
        ),
        "FallbacksAccepted": (
            "False",
            "SelfReference",
            "fallbacks: 'm' is ignored: it is this Model itself; "
            "fallbacks: 'n' is ignored: there is no such Model",
        ),
    }
    assert conditions(other, of(other).resolve("o")) == {
        "AliasesAccepted": ("True", "Accepted", "all aliases are in use")
    }


def test_a_condition_goes_when_its_field_does_and_lists_a_few_entries_only():
    many = make("m", fallbacks=[f"n{i}" for i in range(15)])
    message = conditions(many, of(many).resolve("m"))["FallbacksAccepted"][2]
    assert message.count("no such Model") == 10
    assert message.endswith("; and 5 more")
    with_status = msgspec.structs.replace(
        make("m"), status=status_of(many, Facts(pods=(), left=(), names=of(many).resolve("m")))
    )
    assert conditions(with_status, NO_NAMES) == {}


def test_creation_times_are_compared_in_utc():
    assert make("m").metadata.creation_timestamp == datetime(2026, 1, 1, tzinfo=UTC)
