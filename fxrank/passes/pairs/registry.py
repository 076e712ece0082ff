"""Which pair class stands for which layer class, in which form: the registry, which users extend with `register_pair`."""

import inspect

from torch import nn
from torch.nn.utils import parametrize

from fxrank.passes.errors import unknown_name
from fxrank.passes.model.beyond import beyond_weight, constraint, runs_others, written_by
from fxrank.passes.model.weights import computed_part, declare_plain, is_derived, standardizes, weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.torch_private.modules import can_become, own_parameters

PAIRS: dict[type[nn.Module], dict[str, type[FactorPair]]] = {}
"""Dense layer class → form → pair class. A subclass counts as its base class if it inherits the forward; a subclass with
a forward of its own is traced, and its weight is a raw one, except where it standardizes its weight.
"""
AUTO = "auto"
"""What policies call the choice among forms: the spectra make it."""


def register_pair(dense_class: type[nn.Module], pair_class: type[FactorPair], form: str = "channel") -> None:
    """Let layers of `dense_class` be replaced by pairs of `pair_class`, in this `form`.

    From then on the class is a layer for everything in fxrank: `trace` keeps it as one node, and `factorize`, `profile`,
    `auto_lowrank`, `save`, `load`, `merge` and plans know it. The first form is the one that is taken unless another is asked for
    (`form=`). The layer must hold what it multiplies with as its parameter `weight`, of two or more dimensions, and may have a
    parameter `bias`, which it adds last; a layer that computes anything else than its pair at full rank stays dense. `pair_class` is a subclass of `fxrank.FactorPair`, which says what it must define. A
    process that loads such a model registers the pair first.

    Raises `TypeError` for what is no such class, and `ValueError` for a form that has another class already, or whose name is
    no identifier. Source: Pufferfish §2 and Cuttlefish §3 for the built-in pairs.
    """
    for what, base, found in (("dense_class", nn.Module, dense_class), ("pair_class", FactorPair, pair_class)):
        if not (isinstance(found, type) and issubclass(found, base)):
            name = found.__name__ if isinstance(found, type) else type(found).__name__
            raise TypeError(
                f"{what} must be a subclass of {base.__name__}; got {name}. Call register_pair(MyLayer, MyPair)."
            )
    missing = [name for name in ("kind", "geometry") if not hasattr(pair_class, name)]
    missing += [name for name in ("make_layers", "empty_dense") if _abstract(getattr(pair_class, name))]
    if missing:
        raise TypeError(
            f"a pair class must define kind, geometry, make_layers and empty_dense; {pair_class.__name__} lacks {', '.join(missing)}. "
            "See fxrank.FactorPair."
        )
    if not isinstance(pair_class.kind, str) or not all(isinstance(name, str) for name in pair_class.geometry):
        raise TypeError(
            f"kind must be a name and geometry a tuple of names; got {pair_class.kind!r} and {pair_class.geometry!r} in {pair_class.__name__}."
        )
    if not isinstance(form, str) or not form.isidentifier() or form == AUTO:
        raise ValueError(f"a form's name must be an identifier other than {AUTO!r}; got {form!r}.")
    there = PAIRS.get(dense_class, {})
    if there.get(form, pair_class) is not pair_class:
        raise ValueError(
            f"a form has one pair class; {form!r} of {dense_class.__name__} is {there[form].__name__}, got {pair_class.__name__}. Give it another name: form=…."
        )
    if strange := next((cls for cls in there.values() if cls.kind != pair_class.kind), None):
        raise ValueError(
            f"all forms of a layer have one kind, which plans call it by; {dense_class.__name__} is {strange.kind!r} in {strange.__name__} and "
            f"{pair_class.kind!r} in {pair_class.__name__}. Give them the same."
        )
    PAIRS.setdefault(dense_class, {})[form] = pair_class
    declare_plain(dense_class)


def _abstract(method: object) -> bool:
    return getattr(inspect.unwrap(method), "__isabstractmethod__", False)  # type: ignore[arg-type]


def forms() -> list[str]:
    """The names of all forms."""
    return sorted({form for registered in PAIRS.values() for form in registered})


def kinds() -> set[str]:
    """What plans may call a layer."""
    return {cls.kind for registered in PAIRS.values() for cls in registered.values()}


def check_form(form: str) -> None:
    """Raise `ValueError` for a form that nothing is registered under."""
    if form not in forms():
        raise unknown_name("form", form, forms())


def dense_type(layer: nn.Module) -> type[nn.Module] | None:
    """The class in `PAIRS` that computes what this layer does, None if there is none."""
    kind = type(layer)
    if kind in PAIRS:
        return kind
    for base in kind.__mro__[1:]:
        if base in PAIRS:
            inherits = kind.forward is base.forward and _inner(kind) is _inner(base)
            return base if inherits or standardizes(layer) else None
    return None


def _inner(kind: type[nn.Module]) -> object:
    return getattr(kind, "_conv_forward", None)


def forms_of(dense: nn.Module) -> dict[str, type[FactorPair]]:
    """The pair classes that this layer may have, by form; the first is the one that it has unless another is asked for."""
    kind = dense_type(dense)
    if kind is None or computed_part(dense) is not None:
        return {}
    return {form: cls for form, cls in PAIRS[kind].items() if _refusal(cls, dense) is None}


def beyond(layer: nn.Module) -> str | None:
    """What a layer that has pairs does, or answers, beyond multiplying with its weight: a clause that follows its name."""
    kind = dense_type(layer)
    return None if kind is None else beyond_weight(layer, kind)


def shows_forward(layer: nn.Module) -> bool:
    """Whether a pair takes the place of the layer's weight alone, so that the layer stays, with all that it is `beyond` that: its
    forward is gone through, like that of any module with a raw parameter.
    """
    if beyond(layer) is None or is_derived(layer) or computed_part(layer) is not None or runs_others(layer):
        return False
    return own_parameters(layer).get("weight") is None or bool(forms_of(layer))


def kept_dense(layer: nn.Module) -> str | None:
    """Why a layer that has pairs stays dense all the same, None if a pair may take its whole place. It is asked when layers are
    chosen; a plan or a file that names the layer is followed.
    """
    name = type(layer).__mro__[parametrize.is_parametrized(layer)].__name__
    if (made := constraint(layer)) is not None:
        return f"{name} has no factor pair that keeps what {made} makes of its weight"
    if (more := beyond(layer)) is not None:
        return f"a pair would be less: {name} {more}"
    if (writer := written_by(layer, "weight")) is not None:
        return f"{writer} may write into its weight, which the product of two factors does not allow"
    return None


def _refusal(cls: type[FactorPair], dense: nn.Module) -> str | None:
    """Why this very layer has no pair of this class: it lacks what every pair needs, or the class says so."""
    if strange := [name for name in cls.geometry if not hasattr(dense, name)]:
        return f"without the attribute {strange[0]!r}"
    weight = own_parameters(dense).get("weight")
    if not is_derived(dense) and (weight is None or weight.ndim < 2):
        return "without a parameter 'weight' of two dimensions or more"
    if not cls.is_parameter and not can_become(dense, cls):
        return "because objects of its class have another memory, by __slots__ say"
    return cls.refusal(dense)


def pair_class(dense: nn.Module, form: str = "channel") -> type[FactorPair] | None:
    """The pair class for this layer, or None if it has none. Raises `ValueError` for an unknown form."""
    check_form(form)
    return forms_of(dense).get(form)


def form_of(pair: FactorPair) -> str:
    """The form under which a pair's class is registered."""
    return next(
        (form for registered in PAIRS.values() for form, cls in registered.items() if cls is type(pair)), "channel"
    )


def why_none(dense: nn.Module) -> str:
    """What is said of a layer that has no pair in any form: a clause that follows "has no factor pair"."""
    kind = dense_type(dense)
    reasons = [] if kind is None else [r for cls in PAIRS[kind].values() if (r := _refusal(cls, dense)) is not None]
    return f" {reasons[0]}" if reasons else ""


def make_pair(dense: nn.Module, rank: int, *, form: str = "channel", extra_bn: bool = False) -> FactorPair:
    """A factor pair of rank `rank` that approximates `dense` best (Eckart-Young); equal to it up to rounding at
    full rank.

    `dense` is left as it is; its bias parameter is shared, not copied. Raises `RankError` for a rank outside 1 …
    full rank and `TypeError` for a layer that has no pair.
    """
    cls = pair_class(dense, form)
    if cls is None:
        names = ", ".join(t.__name__ for t, pairs in PAIRS.items() if not any(p.is_parameter for p in pairs.values()))
        raise TypeError(f"only {names} have a factor pair; got {type(dense).__name__}. Leave this layer dense.")
    pair = cls(dense, rank, extra_bn)
    pair.fill_from(weight_of(dense))
    return pair
