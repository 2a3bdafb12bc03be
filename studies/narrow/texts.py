"""Five narrow texts, of about 300 short documents each: four from templates, one of code.

No template is from elsewhere. The documents of a text share its words and phrases, as those of a
cookbook or of a log do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "isingcut"
"""The project whose code is a text."""
DOCUMENTS = 300
LINES = 40

FOOD = (
    "carrot,leek,potato,white bean,red lentil,aubergine,pumpkin,spinach,mushroom,cauliflower,"
    "chickpea,trout,chicken thigh,lamb shoulder,barley,rice,pasta,fennel,beetroot,cabbage"
)
ADDED = "butter,olive oil,thyme,cumin,lemon juice,garlic,soy sauce,cream,mustard,honey,chilli,mint"
AMOUNT = "200 g of,2 tablespoons of,a pinch of,3 large spoons of,half a cup of,1 litre of,a little"
COOK = (
    "Chop the {food} and fry it gently in the {added} for {n} minutes.|"
    "Rinse the {food}, drain it well and set it aside.|"
    "Pour over enough stock to cover the {food}, and simmer until tender, about {n} minutes.|"
    "Stir in the {added} and taste for salt.|"
    "Heat the oven to {hot} degrees and roast the {food} until golden at the edges.|"
    "Mash a third of the {food} with a fork, so that the dish thickens.|"
    "Rest it for {n} minutes under a cloth while you warm the plates.|"
    "Whisk the {added} with a spoon of hot water and fold it through the {food}.|"
    "If it looks dry, loosen it with a ladle of cooking water.|"
    "Scatter with {added} and serve at once with bread."
)
OFFICE = (
    "harbour master,licensing board,county surveyor,registrar,keeper of weights,water authority,"
    "inspector of markets,land tribunal,council of the district,treasurer"
)
THING = (
    "vessel,dwelling,well,footpath,market stall,register,boundary stone,weir,permit,common pasture,"
    "public record,ferry,levy,orchard,quarry"
)
LAW = (
    "A person who owns a {thing} shall notify the {office} in writing within {n} days of "
    "any change.|"
    "The {office} may revoke a permit for a {thing} if the holder fails to comply with "
    "section {n}.|"
    "No {thing} may be let, sold or pledged without the consent of the {office}.|"
    "Subject to subsection ({few}), an appeal lies to the {office} and suspends the decision.|"
    "In this Part, “{thing}” includes any structure used wholly or mainly for the same purpose.|"
    "Whoever wilfully damages a {thing} is liable to a fine not exceeding {hot} crowns.|"
    "The {office} shall publish the fees for each {thing} before the first day of the year.|"
    "Nothing in this section affects a right acquired before its commencement.|"
    "A notice under subsection ({few}) must state the reasons and the date on which "
    "it takes effect."
)
PERSON = "anna,ben,chidi,dora,emil,fatima,greta,hugo"
PART = (
    "login page,nightly build,invoice export,search index,mail queue,test server,print driver,"
    "backup job,price list,mobile app,cache,report page"
)
CHAT = (
    "anyone else seeing the {part} time out?|yep, same here since {n}:{hot}|"
    "i restarted the {part}, give it {n} min|lol it was the certificate again|"
    "can you look at my branch for the {part} when you have a sec|sure, after lunch|"
    "customer says the {part} shows yesterdays numbers|thats the {part}, it runs at {n}|"
    "ok filed a ticket, number {hot}{n}|thx @{person} you saved my day|"
    "brb, meeting|who is on call this week?|me until friday, then {person}|"
    "rolled back the {part}, looks fine now|hm no, still broken for me|try a hard reload?"
)
WER = (
    "Der Nachbar,Die Lehrerin,Mein Großvater,Die Bäckerin,Der Kapitän,Eine alte Frau,Der Postbote,"
    "Das Mädchen aus dem Dorf,Der Müller,Unsere Tante"
)
WAS = (
    "den Garten,die alte Brücke,einen Korb voller Äpfel,das rote Fahrrad,die Uhr am Rathaus,"
    "einen langen Brief,den Kahn am Ufer,das Dach der Scheune,ein Paar Stiefel,die Kuh vom Hof"
)
WANN = "am Morgen,nach dem Regen,im späten Herbst,jeden Sonntag,vor vielen Jahren,kurz vor Mittag"
DEUTSCH = (
    "{wer} hat {wann} {was} repariert und niemandem etwas davon erzählt.|"
    "Weil es {wann} so kalt war, blieb {was} einfach liegen.|"
    "„Hast du {was} gesehen?“, fragte jemand leise.|"
    "{wer} verkaufte {was} für {n} Taler und kam erst {wann} zurück.|"
    "Im Dorf sagte man, dass {wer} ohne {was} nicht leben könne.|"
    "Dann ging {wer} zum Fluss, setzte sich hin und dachte an {was}.|"
    "Die Kinder lachten, denn so etwas hatten sie noch nie erlebt.|"
    "Es dauerte {n} Tage, bis {wer} wieder lächelte.|"
    "Später fand man {was} hinter der Mühle, ganz mit Moos bedeckt."
)


def fill(draw: random.Random, template: str) -> str:
    """Fill the slots of a template, each with one of its words."""
    slots = {
        "food": FOOD,
        "added": ADDED,
        "office": OFFICE,
        "thing": THING,
        "person": PERSON,
    }
    slots |= {"part": PART, "wer": WER, "was": WAS, "wann": WANN}
    words = {name: draw.choice(text.split(",")) for name, text in slots.items()}
    numbers = {
        "n": draw.randint(2, 23),
        "few": draw.randint(1, 4),
        "hot": draw.randint(10, 59),
    }
    return template.format(**words, **numbers)


def sentences(draw: random.Random, templates: str, count: int) -> list[str]:
    """Return distinct sentences of templates, in random order."""
    return [
        fill(draw, template) for template in draw.sample(templates.split("|"), count)
    ]


def recipe(draw: random.Random) -> str:
    first, second, added = (draw.choice(x.split(",")) for x in (FOOD, FOOD, ADDED))
    parts = [f"{draw.choice(AMOUNT.split(','))} {x}" for x in (first, second, added)]
    steps = [f"{k}. {text}" for k, text in enumerate(sentences(draw, COOK, 6), 1)]
    return "\n".join([f"{first.title()} with {second} and {added}", *parts, *steps])


def law(draw: random.Random) -> str:
    head = fill(draw, "Section {hot}. Duties of the {office} towards every {thing}.")
    rows = [f"({k}) {text}" for k, text in enumerate(sentences(draw, LAW, 5), 1)]
    return "\n".join([head, *rows])


def chat(draw: random.Random) -> str:
    start = draw.randint(480, 1100)
    minutes = [start := start + draw.randint(0, 7) for _ in range(9)]
    lines = zip(minutes, sentences(draw, CHAT, 9), strict=True)
    named = [(m, draw.choice(PERSON.split(",")), text) for m, text in lines]
    return "\n".join(
        f"[{m // 60:02}:{m % 60:02}] {name}: {text}" for m, name, text in named
    )


def german(draw: random.Random) -> str:
    return " ".join(sentences(draw, DEUTSCH, 6))


WRITERS: dict[str, Callable[[random.Random], str]] = {
    "recipes": recipe,
    "laws": law,
    "chat logs": chat,
    "German": german,
}
NAMES = (*WRITERS, "code")


def _code() -> list[str]:
    wholes = [
        file.read_text(encoding="utf-8").splitlines() for file in SOURCE.rglob("*.py")
    ]
    starts = [
        (lines, k) for lines in wholes for k in range(0, len(lines) - LINES // 2, LINES)
    ]
    parts = sorted("\n".join(lines[k : k + LINES]) for lines, k in starts)
    return random.Random(0).sample(parts, DOCUMENTS)


def write_text(name: str, folder: Path) -> Path:
    """Write the documents of a text as JSON lines, and return the file."""
    draw = random.Random(name)
    texts = (
        [WRITERS[name](draw) for _ in range(DOCUMENTS)] if name in WRITERS else _code()
    )
    file = folder / f"{name}.jsonl"
    file.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    return file
