"""Home commands and their JSON intents, drawn from the sentence grammar of Home Assistant.

The package `home-assistant-intents` holds 862 English sentence templates in 42 intents, such as

    [<set>] [<the>] {floor} [floor] fan[s] [speed] [to] {fan_speed:percentage}[%| percent]

A walk through a template takes one alternative at each fork and one value at each list, and so gives a sentence with
its slots: "make our first floor fan 14 percent" is HassFanSetSpeed with floor "first floor" and percentage 14. Areas,
floors, names and free text are left open by the grammar, because they are the user's own; the lists below fill them.

The lists keep the task well defined. No word stands in two of them where a reader would have to guess which is meant
(no area is called "garage", for "garage door" is a kind of cover), and no light's name says "light", for the templates
allow the word after any name. For the sake of recognition the grammar also takes what nobody says ("is there all light
on"); such walks are drawn again.

Held out are whole templates, never sentences: a random split would leak every pattern into the evaluation.
Source: https://github.com/home-assistant/intents (CC BY 4.0) and its parser https://github.com/OHF-Voice/hassil.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from hassil.expression import Alternative, ListReference, Permutation, RuleReference, Sequence, TextChunk
from hassil.intents import Intents, RangeSlotList, TextSlotList
from hassil.parse_expression import parse_sentence

from twofold.data.splits import Row, Splits, chat_row, check_counts, write_splits
from twofold.downloads import wheel_file
from twofold.errors import DataError
from twofold.events import Emit, Warned, silent

SYSTEM = "Turn the home command into a JSON intent."
PACKAGE, VERSION, MEMBER = "home-assistant-intents", "2026.10.27", "home_assistant_intents/data/en.json"
SHA256 = "0b9d606a216b1712409a3d822a8edfb9ff4458e51e421792882ea24e0ce1d456"
HELD_OUT = 0.15
"""The share of each intent's templates that only the evaluation sees."""
ATTEMPTS = 300
"""Walks through one template in search of a new and natural sentence, before it counts as exhausted."""


def _lists(text: str) -> dict[str, tuple[str, ...]]:
    """One list a line: its name, a colon and its words; an indented line goes on with the list above it."""
    lines = text.replace("\n  ", " ").strip().splitlines()
    return {name: tuple(words.strip().split(", ")) for name, _, words in (line.partition(":") for line in lines)}


WORDS = _lists("""
area: kitchen, living room, bedroom, bathroom, office, hallway, dining room, nursery, laundry room, guest room, study,
  library, playroom, porch, patio, balcony, garden, workshop, sunroom, pantry, den, entryway, mudroom, terrace
floor: first floor, second floor, third floor, ground floor, top floor, basement, attic, cellar, loft, mezzanine,
  upstairs, downstairs, lower level, upper level, main level
zone: home, work, school, gym, airport, university, hospital, church, park
message: dinner is ready, the taxi is here, it is time for bed, we are leaving in ten minutes, the parcel has arrived,
  breakfast is on the table, the movie is about to start, someone is at the door, please be quiet, the cake is done
timer_name: pizza, laundry, tea, pasta, workout, nap, homework, bread, meditation, roast, cookies, rice, soup, egg
timer_command: turn off the lights, open the blinds, lock the front door, play some jazz, turn on the ceiling fan,
  close the roller blind, turn on the kettle, mute the television, dim the chandelier, turn off the dishwasher,
  open the sprinkler valve, start the robot vacuum, unlock the side door, set the thermostat to 20 degrees
shopping_list_item: milk, eggs, bread, butter, olive oil, apples, bananas, coffee beans, dish soap, toilet paper,
  oat milk, tomatoes, cat food, rice, cheddar cheese, orange juice, batteries, garlic, frozen peas, toothpaste
todo_list_item: call the plumber, tent pegs, sunscreen, pay the rent, wash the car, passport, birthday cake, clean the
  gutters, sand the shelf, head torch, book the ferry, fix the gate, wrapping paper, light bulbs, walking boots
""")
"""What fills the lists that the grammar leaves open, by list name."""
NAMES = _lists("""
light: chandelier, vanity, nightstand, bookshelf, aquarium, headboard, countertop, fireplace, workbench, wardrobe,
  sideboard, display cabinet, christmas tree, sconce, pendant, bedside, piano, easel, coffee table, reading corner
switch: coffee maker, kettle, dehumidifier, space heater, water heater, printer, phone charger, washing machine,
  dishwasher, rice cooker, electric blanket, router, fountain pump, towel warmer
fan: ceiling fan, tower fan, pedestal fan, exhaust fan, box fan, desk fan, window fan, air purifier, bladeless fan
media_player: television, soundbar, record player, smart speaker, receiver, projector, radio, stereo, jukebox
input_boolean: vacation mode, guest mode, sleep mode, quiet hours, away mode, holiday mode
climate: thermostat, heat pump, air conditioner, radiator, floor heating, boiler, mini split, furnace
sensor: outdoor humidity, rain gauge, power meter, solar production, air quality index, water meter, battery level
binary_sensor: mailbox, fridge, freezer, cat flap, medicine cabinet, wine cooler, skylight, letter box, tool chest
occupancy: driveway, parking spot, dog bed, couch, crib, guest bed, treadmill, bathtub, doormat, garden bench
cover: roller blind, venetian blinds, blackout curtain, skylight shade, storm shutters, roman shade, sliding gate
valve: main water valve, gas valve, sprinkler valve, irrigation valve, pool valve, fountain valve, drip line
lock: front door, back door, side door, deadbolt, french door, trap door, tool shed, gun safe, bike shed
button: doorbell, panic, pet feeder, elevator call, coffee brew, reboot router, find my phone, reset filter
scene: movie night, romantic dinner, bright morning, game day, reading time, bedtime, deep focus, sunset glow
script: morning routine, good night, arrival routine, cleaning routine, school run, wind down, flash warning
lawn_mower: Shaun, grass cutter, Daisy, meadow bot, lawn ranger, Clipper
vacuum: robot vacuum, Rosie, Dusty, floor sweeper, crumb hunter, Hoovert
person: Emma, Liam, Olivia, Noah, Priya, Mateo, Yuki, Fatima, mum, dad, grandma, grandpa
weather: Berlin, Lisbon, Nairobi, Toronto, Osaka, Reykjavik, Auckland, Chicago, Lima, Oslo
todo: chores, packing, camping, birthday, hardware store, homework, renovation, holiday, gardening, moving day
""")
"""Device names by domain; `occupancy` is the part of binary_sensor that tells whether somebody is there."""
MEDIA = _lists("""
artist: Nina Simone, Miles Davis, Ella Fitzgerald, Django Reinhardt, Clara Schumann, Fela Kuti
album: Kind of Blue, Blue Train, The Four Seasons, Time Out, Goldberg Variations
track: Clair de Lune, Take Five, Auld Lang Syne, The Entertainer, Moonlight Sonata, Greensleeves
playlist: morning run, rainy day, road trip, cooking jazz, slow sunday, nineties party
podcast: deep sea stories, history by night, the daily garden, plain physics, city sounds
movie: Metropolis, Nosferatu, The General, City Lights, Sherlock Jr
tv_show: The Great Baking Race, Harbour Lights, Planet Diaries, Midnight Detectives, Cabin Builders
""")
"""What can be played, by media class."""

_PERCENT = (*range(5, 101, 5), 1, 2, 14, 33, 42, 66, 77, 88)
_TIME = (1, 2, 3, 4, 5, 8, 10, 12, 15, 20, 25, 30, 35, 40, 45, 50, 90)
NUMBERS: dict[str, tuple[float, ...]] = {
    "temperature": (*range(16, 27), 17.5, 18.5, 19.5, 20.5, 21.5, 22.5),
    "color_temperature": tuple(range(2000, 6501, 100)),
    **dict.fromkeys(("position", "fan_speed", "brightness", "volume"), _PERCENT),
    **dict.fromkeys(("volume_step_up", "volume_step_down"), (2, 3, 5, 8, 10, 12, 15, 20, 25, 30)),
    **dict.fromkeys(("timer_seconds", "timer_minutes"), _TIME),
    "timer_hours": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12),
}
"""The likely part of each range of the grammar."""


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PLACE = _any_of(WORDS["area"] + WORDS["floor"])
_PROPER = _any_of(n for kind in ("person", "weather", "vacuum", "lawn_mower") for n in NAMES[kind] if " " not in n)
_ONE = "light|lamp|fan|switch|lock|door|window|gate|shutter|awning|blind|curtain|shade"
_MANY = "lights|lamps|fans|switches|locks|doors|windows|gates|shutters|awnings|blinds|curtains|shades"
_STATE = "on|off|open|opening|closed|closing|shut|shutting|locked|unlocked|occupied|detected|triggered|empty|clear"
_DEVICE = f"{_ONE}|{_MANY}|lighting"
_UNIT = "hour|minute|second"
_TIMER = rf"(?: (?:and )?\d+[ -](?:{_UNIT}))* timer"
_AWKWARD = (
    # articles: doubled, after a place, before a proper name, after or before words that take none
    rf"\b(?:the|my|our) (?:the|my|our|any|some|all|every|each|{_PROPER})\b",
    rf"\b(?:any|some|every|each|single|which|what|many|{_PLACE}) (?:the|my|our)\b",
    rf"\b(?:any|some) of (?!the|my|our)|\bwhat of|\b(?:{_any_of(WORDS['floor'])}) floor\b",
    rf"\b(?:is|are) (?:the|my|our|there) (?:securely|{_STATE})\b",
    rf"\ban (?!8|11\b|18\b)\d|\ba (?:8|11|18|1/2)\b|\ban timer|\ban? (?:{_UNIT})s|half (?:{_UNIT})\b",
    # number: one thing or several
    rf"\b(?:all|many|are(?: any| some))\b(?: [\w']+){{0,4}} (?:{_ONE}|room|area|floor)\b",
    rf"\b(?:every|each|single)\b(?: [\w']+){{0,3}} (?:{_MANY}|rooms|areas|floors)\b",
    rf"\b(?:any|some|which|each) of (?:the|my|our)(?: \w+){{0,3}} (?:{_ONE})\b",
    rf"\b(?:{_ONE}|lighting) are\b|\b(?:{_MANY}) is\b|\bis (?:there )?(?:any|some|all)\b.* (?:{_MANY})\b",
    r"\b(?:is|are) there (?!any|some)|\bare (?:every|each)\b|\b(?:every|many|each)\b.* lighting\b",
    # durations: "10 minutes", but "a 10 minute timer"
    rf"\b(?!1[ -])\d+[ -](?:{_UNIT})\b(?!{_TIMER})|\d-(?:{_UNIT})\b(?!{_TIMER})|\d degree\b",
    rf"\b1[ -](?:{_UNIT})s|\d-(?:{_UNIT})s|(?:{_UNIT})s(?: (?:and )?\d+[ -](?:{_UNIT}))?{_TIMER}",
    # verbs that do not go with their particle, or are missing
    r"^(?:change|bring)\b.* (?:off|out)\b|\b(?:change|bring) on\b|\b(?:lower|shut) up\b",
    r"^(?:turn|switch|change|bring) (?!.*\b(?:on|off|out|up|down|to)\b)|^(?:activate|run|start)\b.* on$",
    r"\bturn(?: the)?(?: volume)? (?:increase|decrease)\b|^time is left|^tell me.* like$|^stop playing$",
    r"^(?:the|my|our) .* to\b|\b(?:my|our) (?:color|brightness|speed|temp)|\bcomplete\b.* off\b|(?:delete|remove) off",
    # a place without its preposition, or with a needless one
    r"(?<!in )(?<!clean )(?<!vacuum )(?<!light )(?<!light up )\b(?:this|the|my|our) (?:room|area|space)\b",
    rf"\b(?:{_DEVICE}|off|out) (?:the|my|our) (?:entire |whole )?(?:home|house|apartment|flat)$",
    rf"\b(?:{_DEVICE}|again|back|item|next|skip|song|track|volume|music|shows?) (?:the|my|our) (?:{_PLACE})\b",
    rf"\b(?:{_DEVICE}) (?:all (?!over)|every\b|each\b)|\bin(?: the| my| our)? \w+ (?:floor|level)\b",
    r"\b(?:in|at|of|across|around|throughout)(?: the| my| our)? (?:up|down)stairs\b",
    rf"\b(?:to|off|from|on|in) (?:my |the )?(?:{_any_of(NAMES['todo'])})$",
)
_AWKWARD_TEXT = re.compile("|".join(_AWKWARD))
"""What the grammar accepts, for the sake of recognition, but nobody says."""
_AWKWARD_QUESTION = re.compile(rf"^(?:all|every|each|some)\b|\b(?:{_STATE}) (?:(?:the|my|our) )?(?:{_PLACE})\b")
"""The same for questions: without its verb, "all fans off" is a command as well."""


@dataclass(frozen=True)
class HomeIntents(Splits):
    """The two splits as chat rows, and the names of all the intents, sorted."""

    intents: list[str]


@dataclass(frozen=True)
class Template:
    """One sentence template of an intent; `names` may fill its {name}, `fixed` slots are in every answer."""

    intent: str
    text: str
    names: tuple[str, ...]
    fixed: dict[str, Any]
    expression: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Grammar:
    """The templates in the order of the file, with the rules and lists that they refer to, parsed by hassil."""

    templates: list[Template]
    rules: dict[str, Any]
    lists: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A sentence and what it means."""

    text: str
    intent: str
    slots: dict[str, Any]

    def row(self) -> Row:
        """The chat that teaches it: system, user, and the compact JSON answer with its slots sorted by name."""
        meaning = {"intent": self.intent, "slots": dict(sorted(self.slots.items()))}
        answer = json.dumps(meaning, separators=(",", ":"), ensure_ascii=False)
        return chat_row(SYSTEM, self.text, answer)


def build(train_examples: int, evaluation_examples: int, seed: int = 0, emit: Emit = silent) -> HomeIntents:
    """Draw the two splits; equal arguments give equal rows on every machine.

    No sentence occurs twice, within a split or across. Evaluation rows do not depend on `train_examples`, and begin
    with one of each intent that has templates to hold out; training rows are in random order.

    Raises:
        DataError: an example count is not positive.
        DownloadError: the grammar cannot be fetched.
    """
    check_counts(train_examples, evaluation_examples)
    grammar = load_grammar(emit)
    training, held_out = split_templates(grammar.templates, seed)
    taken: set[str] = set()
    evaluation = draw(grammar, held_out, evaluation_examples, random.Random(f"evaluation {seed}"), taken, emit=emit)
    rng = random.Random(f"training {seed}")
    train = draw(grammar, training, train_examples, rng, taken, emit=emit)
    rng.shuffle(train)
    intents = sorted({template.intent for template in grammar.templates})
    return HomeIntents([command.row() for command in train], [command.row() for command in evaluation], intents)


def write(
    folder: Path, train_examples: int, evaluation_examples: int, seed: int = 0, emit: Emit = silent
) -> HomeIntents:
    """Build the splits and write `train.jsonl` and `evaluation.jsonl` into `folder`, each whole or not at all.

    Raises:
        DataError, DownloadError: as `build`.
        RunError: the folder cannot be written.
    """
    data = build(train_examples, evaluation_examples, seed, emit)
    write_splits(folder, data)
    return data


def load_grammar(emit: Emit = silent) -> Grammar:
    """The English grammar, fetched at the first call; raises DownloadError when it cannot be."""
    content = json.loads(wheel_file(PACKAGE, VERSION, MEMBER, SHA256, emit).read_text(encoding="utf-8"))
    intents = Intents.from_dict(content)
    templates = [
        Template(intent.name, text, _names(block.requires_context, text), block.slots, parse_sentence(text).expression)
        for intent in intents.intents.values()
        for block in intent.data
        for text in block.sentence_texts
    ]
    return Grammar(templates, intents.expansion_rules, intents.slot_lists)


def _names(context: dict[str, Any], text: str) -> tuple[str, ...]:
    """Names from the domains that a block is for. An area that the context asks for is not said, hence no slot."""
    domains = ["occupancy"] if "{bs_occupancy_states:" in text else context.get("domain", [])
    return tuple(name for domain in domains for name in NAMES.get(domain, ()))


def split_templates(templates: list[Template], seed: int = 0) -> tuple[list[Template], list[Template]]:
    """Part the templates into those for training and those held out, intent by intent.

    Of each intent with two different template texts or more, about 15 % and at least one are held out; templates that
    share a text go together. Both lists take the intents in turn, so that any prefix covers as many as it can.
    """
    rng = random.Random(f"split {seed}")
    texts: dict[str, dict[str, None]] = {}
    for template in templates:
        texts.setdefault(template.intent, {})[template.text] = None
    held_out = {
        (intent, text)
        for intent, known in texts.items()
        if len(known) > 1
        for text in rng.sample(list(known), max(1, round(HELD_OUT * len(known))))
    }
    shuffled = rng.sample(templates, len(templates))
    training = [template for template in shuffled if (template.intent, template.text) not in held_out]
    evaluation = [template for template in shuffled if (template.intent, template.text) in held_out]
    return _in_turn(training), _in_turn(evaluation)


def _in_turn(templates: list[Template]) -> list[Template]:
    """The first template of each intent, then the second of each, and so on."""
    by_intent: dict[str, list[Template]] = {}
    for template in templates:
        by_intent.setdefault(template.intent, []).append(template)
    return [template for turn in zip_longest(*by_intent.values()) for template in turn if template]


def draw(
    grammar: Grammar, templates: list[Template], count: int, rng: random.Random, taken: set[str], *, emit: Emit
) -> list[Command]:
    """`count` commands, one from each template in turn; fewer, with a warning, once every template is exhausted.

    Sentences in `taken` (lower case) are avoided, and the new ones are added to it.
    """
    commands = list(islice(_rounds(grammar, templates, rng, taken), count))
    if len(commands) < count:
        emit(Warned(text=f"the home grammar gave {len(commands)} new sentences, not the {count} asked for"))
    return commands


def _rounds(grammar: Grammar, templates: list[Template], rng: random.Random, taken: set[str]) -> Iterator[Command]:
    while templates:
        productive = []
        for template in templates:
            if command := _fresh(grammar, template, rng, taken):
                taken.add(command.text.lower())
                productive.append(template)
                yield command
        templates = productive


def _fresh(grammar: Grammar, template: Template, rng: random.Random, taken: set[str]) -> Command | None:
    for _ in range(ATTEMPTS):
        command = _Walk(grammar, template, rng).command()
        if command.text.lower() not in taken and _is_natural(command):
            return command
    return None


class _Walk:
    """One random path through a template: the words on the way, and the slots that they fill."""

    def __init__(self, grammar: Grammar, template: Template, rng: random.Random) -> None:
        self.grammar, self.template, self.rng = grammar, template, rng
        self.slots: dict[str, Any] = dict(template.fixed)
        self.media_class = rng.choice(list(MEDIA))

    def command(self) -> Command:
        text = " ".join(self._words(self.template.expression).split())
        return Command(text, self.template.intent, self.slots)

    def _words(self, node: Any) -> str:
        match node:
            case TextChunk():
                return str(node.original_text)
            case ListReference():
                return self._value(node.list_name, node.slot_name)
            case RuleReference(rule_name="in") if self.rng.random() < 0.7:
                return self.rng.choice(("in", "in", "in", "on"))  # the rule's seven are far from equally likely
            case RuleReference():
                return self._words(self.grammar.rules[node.rule_name].expression)
            case Alternative():
                return self._words(self.rng.choice(node.items))
            case Permutation() | Sequence():
                items = self.rng.sample(node.items, len(node.items)) if isinstance(node, Permutation) else node.items
                return "".join(self._words(item) for item in items)
        raise DataError(f"the home grammar holds an unknown {type(node).__name__}; install hassil 3.12")

    def _value(self, list_name: str, slot: str) -> str:
        """Choose a value of a list: its meaning goes into the slot, its words are returned."""
        values = self.grammar.lists.get(list_name)
        if isinstance(values, TextSlotList):
            fitting = [v for v in values.values if list_name != "media_class" or v.value_out == self.media_class]
            value = self.rng.choice(fitting)
            self.slots[slot] = value.value_out
            return self._words(value.text_in)
        if isinstance(values, RangeSlotList):
            number = self.rng.choice(NUMBERS[list_name])
            self.slots[slot] = number if values.multiplier is None else int(number * values.multiplier)
            return str(number)
        open_lists = WORDS | {"name": self.template.names, "search_query": MEDIA[self.media_class]}
        self.slots[slot] = self.rng.choice(open_lists[list_name])
        return str(self.slots[slot])


def _is_natural(command: Command) -> bool:
    text, slots = command.text, command.slots
    if _AWKWARD_TEXT.search(text) or ("name" in slots and _disagrees(text, slots["name"])):
        return False
    if command.intent == "HassGetState" and _AWKWARD_QUESTION.search(text):
        return False
    return slots.get("state") not in WORDS["zone"] or _place_is_said(text, slots["state"])


def _disagrees(text: str, name: str) -> bool:
    wrong = "is" if name.endswith("s") else "are"
    return re.search(rf"\b{wrong} (?:the |my |our )?{re.escape(name)}\b", text) is not None


def _place_is_said(text: str, zone: str) -> bool:
    """People are "home", but "at work" and "in the park"."""
    if zone == "home":
        return re.search(r"\b(?:in|on|of|across|around|throughout|the|my|our) home$", text) is None
    return re.search(rf"\b(?:in|at) (?:the |my |our )?{zone}$", text) is not None
