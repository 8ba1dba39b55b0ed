"""The language of the photo world: how each operation may be asked for. Held-out wordings are made of known words."""

from __future__ import annotations

from dataclasses import dataclass

from .edits import Add, Canvas, Move, Operation, Recolour, Remove, Reshape, Resize, Swap, Tint, Tone
from .objects import LARGE, Thing

__all__ = ["JOINTS", "Phrasings", "all_words", "wordings"]


@dataclass(frozen=True, kw_only=True)
class Phrasings:
    """Ways to ask for one thing; the held-out ones are never trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def filled(self, **fields: str) -> Phrasings:
        return Phrasings(
            train=tuple(text.format(**fields) for text in self.train),
            held_out=tuple(text.format(**fields) for text in self.held_out),
        )


def _say(*train: str, held_out: tuple[str, ...]) -> Phrasings:
    return Phrasings(train=train, held_out=held_out)


JOINTS = _say(
    "{first} and {second}", "{first}, then {second}", "{first}, {second}", held_out=("{first} and then {second}",)
)

TONE_WORDS = {
    "night": _say(
        "make it night",
        "turn it into night",
        "make it a night scene",
        "as if it were night",
        "change day to night",
        "make it look like night",
        "night time",
        "let night fall",
        "turn the day into night",
        held_out=("turn it into a night scene", "make it night time", "it should look like night"),
    ),
    "sunset": _say(
        "make it sunset",
        "add a sunset",
        "turn it into a sunset",
        "at sunset",
        "make it look like sunset",
        "change the light to sunset",
        "give it the light of a sunset",
        "sunset light",
        held_out=("make it a sunset", "as if it were sunset", "turn the light into sunset light"),
    ),
    "black and white": _say(
        "make it black and white",
        "turn it black and white",
        "black and white photo",
        "remove the colour",
        "change it to black and white",
        "take the colour away",
        "as a black and white photo",
        "make it grey",
        "make the picture black and white",
        "turn the photo black and white",
        "change the photo to black and white",
        "turn everything black and white",
        "take the colours out of the photo",
        "remove the colours",
        held_out=("turn it into a black and white photo", "make the photo black and white", "take away the colour"),
    ),
    "sepia": _say(
        "make it sepia",
        "turn it sepia",
        "sepia photo",
        "as an old photo",
        "make it look like an old photo",
        "change it to sepia",
        "give it a sepia tone",
        "make it an old sepia photo",
        held_out=("turn it into an old photo", "make the photo sepia", "as a sepia photo"),
    ),
    "fog": _say(
        "add fog",
        "make it foggy",
        "put it in fog",
        "let fog rise",
        "turn the weather to fog",
        "cover it with fog",
        "make it look foggy",
        "as if it were foggy",
        "fill it with mist",
        "make it misty",
        held_out=("add mist", "cover it with mist", "it should be foggy"),
    ),
    "sketch": _say(
        "make it a sketch",
        "turn it into a sketch",
        "as a pencil sketch",
        "make it a pencil drawing",
        "turn it into a drawing",
        "draw it with a pencil",
        "make it look like a sketch",
        "change it to a drawing",
        held_out=("turn it into a pencil sketch", "make it look like a drawing", "as a drawing"),
    ),
    "painting": _say(
        "make it a painting",
        "turn it into a painting",
        "as an oil painting",
        "make it look like a painting",
        "change it to a painting",
        "paint it in oil",
        "turn the photo into an oil painting",
        "make it painted",
        held_out=("make it an oil painting", "turn the photo into a painting", "as a painting"),
    ),
    "snow": _say(
        "make it snow",
        "add snow",
        "let it snow",
        "make it snowy",
        "cover it with snow",
        "turn it into winter",
        "make it winter",
        "put it in snow",
        "as if it were winter",
        "make it look snowy",
        held_out=("it should snow", "make it look like winter", "as if it were snowy"),
    ),
    "autumn": _say(
        "make it autumn",
        "turn it into autumn",
        "make it look like autumn",
        "change the season to autumn",
        "as if it were autumn",
        "give it autumn leaves",
        "autumn colours",
        "make the leaves brown",
        "make it fall",
        held_out=("it should look like autumn", "change it to autumn", "give it autumn colours"),
    ),
    "negative": _say(
        "make it a negative",
        "invert it",
        "invert the colours",
        "turn it into a negative",
        "as a photo negative",
        "make the photo negative",
        "reverse the colours",
        "change it to its negative",
        held_out=("make it a photo negative", "invert the photo", "as a negative"),
    ),
    "warmer": _say(
        "make it warmer",
        "make the colours warmer",
        "give it a warm tone",
        "warm it up",
        "add warmth",
        "make the photo warm",
        "turn the light warmer",
        "warmer colours",
        "make it warm",
        held_out=("make the light warmer", "give it warmer colours", "it should be warmer"),
    ),
    "colder": _say(
        "make it colder",
        "make the colours colder",
        "give it a cold tone",
        "cool it down",
        "add cold light",
        "make the photo cold",
        "turn the light colder",
        "colder colours",
        "make it cooler",
        "make it cold",
        held_out=("make the light colder", "give it colder colours", "it should be colder"),
    ),
}

TINT = _say(
    "make the {colour} things {target}",
    "turn everything {colour} {target}",
    "change {colour} to {target}",
    "make everything {colour} {target}",
    "paint the {colour} parts {target}",
    "replace {colour} with {target}",
    "make what is {colour} {target}",
    "turn the {colour} parts {target}",
    held_out=("turn the {colour} things {target}", "make the {colour} parts {target}", "turn {colour} to {target}"),
)
ADD = _say(
    "add {thing}",
    "put {thing} in the picture",
    "draw {thing}",
    "add {thing} to the photo",
    "place {thing} somewhere",
    "let there be {thing}",
    "put {thing} on it",
    held_out=("put {thing} somewhere", "add {thing} to the picture"),
)
REMOVE = _say(
    "remove the {thing}",
    "delete the {thing}",
    "take away the {thing}",
    "get rid of the {thing}",
    "take the {thing} out of the picture",
    "erase the {thing} from it",
    "let the {thing} go away",
    "the {thing} should go away",
    held_out=("take the {thing} away", "remove the {thing} from the picture", "delete the {thing} from the photo"),
)
RECOLOUR = _say(
    "make the {thing} {target}",
    "turn the {thing} {target}",
    "paint the {thing} {target}",
    "give the {thing} the colour {target}",
    "change the colour of the {thing} to {target}",
    "the {thing} should become {target}",
    held_out=("the {thing} should be {target}", "change the {thing} to {target}"),
)
RESHAPE = _say(
    "turn the {thing} into a {target}",
    "replace the {thing} with a {target}",
    "make the {thing} a {target}",
    "change the {thing} to a {target}",
    "the {thing} should become a {target}",
    "make a {target} of the {thing}",
    held_out=("change the {thing} into a {target}", "the {thing} should be a {target}"),
)
ENLARGE = _say(
    "enlarge the {thing}",
    "make the {thing} larger",
    "make the {thing} bigger",
    "let the {thing} grow",
    "the {thing} should be larger",
    "make a large {thing} of it",
    held_out=("the {thing} should be bigger", "make the {thing} large", "let the {thing} become larger"),
)
SHRINK = _say(
    "shrink the {thing}",
    "make the {thing} smaller",
    "make the {thing} small",
    "let the {thing} shrink",
    "the {thing} should be smaller",
    "reduce the size of the {thing}",
    held_out=("the {thing} should be small", "reduce the {thing}", "let the {thing} become smaller"),
)
MOVE = _say(
    "move the {thing} {way}",
    "move the {thing} {to}",
    "shift the {thing} {to}",
    "push the {thing} {way}",
    "bring the {thing} {to}",
    "put the {thing} further {way}",
    "the {thing} should move {to}",
    held_out=("shift the {thing} {way}", "push the {thing} {to}", "move the {thing} further {way}"),
)
SWAP = _say(
    "swap the {first} and the {second}",
    "exchange the {first} and the {second}",
    "switch the {first} and the {second}",
    "let the {first} and the {second} change places",
    "swap the places of the {first} and the {second}",
    held_out=(
        "exchange the places of the {first} and the {second}",
        "the {first} and the {second} should change places",
    ),
)


def wordings(operation: Operation, canvas: Canvas) -> Phrasings:
    """All ways to ask for an operation on a canvas."""
    if isinstance(operation, Tone):
        return TONE_WORDS[operation.name]
    if isinstance(operation, Tint):
        return TINT.filled(colour=operation.colour, target=operation.target)
    if isinstance(operation, Add):
        thing = operation.thing
        name = f"{'large ' if thing.size == LARGE else ''}{thing.colour} {thing.shape}"
        return ADD.filled(thing=f"{'an' if name[0] in 'aeiou' else 'a'} {name}")
    if isinstance(operation, Swap):
        return _pairs(canvas)
    return _on_thing(operation, canvas)


def _on_thing(operation: Operation, canvas: Canvas) -> Phrasings:
    if isinstance(operation, Remove):
        phrasings, fields = REMOVE, {}
    elif isinstance(operation, Recolour):
        phrasings, fields = RECOLOUR, {"target": operation.colour}
    elif isinstance(operation, Reshape):
        phrasings, fields = RESHAPE, {"target": operation.shape}
    elif isinstance(operation, Resize):
        phrasings, fields = (ENLARGE if operation.size == LARGE else SHRINK), {}
    elif isinstance(operation, Move):
        side = operation.way in ("left", "right")
        phrasings, fields = MOVE, {"way": operation.way, "to": f"to the {operation.way}" if side else operation.way}
    else:
        raise TypeError(f"no words for {operation}")
    names = _names(canvas, operation.index)
    return _joined([phrasings.filled(thing=name, **fields) for name in names])


def _joined(spoken: list[Phrasings]) -> Phrasings:
    """All of them; what one trains on is held out by none ("push it down" is "push it {way}" and "push it {to}")."""
    train = tuple(text for phrasings in spoken for text in phrasings.train)
    held_out = tuple(text for phrasings in spoken for text in phrasings.held_out)
    return Phrasings(train=train, held_out=tuple(text for text in held_out if text not in train))


def _names(canvas: Canvas, index: int) -> list[str]:
    """What an object can be called so that no other is meant."""
    thing = canvas.things[index]
    others = [other for n, other in enumerate(canvas.things) if n != index]
    names = [f"{thing.colour} {thing.shape}"]
    if all(other.shape != thing.shape for other in others):
        names.append(thing.shape)
    if others:
        if all(other.colour != thing.colour for other in others):
            names.append(f"{thing.colour} one")
        side = _side(thing, others[0])
        names += [f"{side} one", f"{thing.shape} on the {side}"]
    return names


def _side(thing: Thing, other: Thing) -> str:
    return "left" if thing.x + thing.size / 2 < other.x + other.size / 2 else "right"


def _pairs(canvas: Canvas) -> Phrasings:
    first, second = canvas.things
    same = first.shape == second.shape
    names = [(f"{first.colour} {first.shape}", f"{second.colour} {second.shape}")]
    names += [] if same else [(first.shape, second.shape)]
    both = [*names, *((b, a) for a, b in names)]
    return _joined([SWAP.filled(first=a, second=b) for a, b in both])


def all_words() -> list[str]:
    """Every text out of which all wordings are made, for the vocabulary."""
    from .objects import COLOURS, SHAPES

    phrasings = [*TONE_WORDS.values(), TINT, ADD, REMOVE, RECOLOUR, RESHAPE, ENLARGE, SHRINK, MOVE, SWAP, JOINTS]
    texts = [text for p in phrasings for text in p.train + p.held_out]
    fields = ("colour", "target", "shape", "thing", "way", "to", "first", "second")
    bare = [text.format(**dict.fromkeys(fields, "")) for text in texts]
    extra = ["a large", "an", "left one on the right", "up down", *COLOURS, *SHAPES]
    return [*bare, *extra]
