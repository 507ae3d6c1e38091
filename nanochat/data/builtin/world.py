"""The town of Larkwood: who lives there, where things are, and a little of the world outside.

Stories obey these tables, descriptions recite them, questions ask for them. They are few, so that a very small model
can know them all by heart.
"""

# ruff: noqa: E501 (tables of sentences, one to a line)

from dataclasses import dataclass

TOWN = "Larkwood"


@dataclass(frozen=True)
class Person:
    """Someone of Larkwood; `pet` is a kind of animal, `friend` a name of another person."""

    name: str
    he: str
    job: str
    home: str
    trait: str
    food: str
    color: str
    pet: str
    pet_name: str
    friend: str
    hobby: str

    @property
    def him(self) -> str:
        return {"he": "him", "she": "her"}[self.he]

    @property
    def his(self) -> str:
        return {"he": "his", "she": "her"}[self.he]


_PEOPLE = """
Mira  | she | baker         | the old mill by the river     | kind     | plum cake      | yellow | cat    | Pip    | Tom   | singing
Tom   | he  | fisherman     | a fishing hut by the lake     | patient  | fried fish     | blue   | dog    | Biscuit| Mira  | telling tales
Anna  | she | teacher       | a white house near the school | clever   | tomato soup    | green  | parrot | Kiwi   | Hugo  | reading
Ben   | he  | carpenter     | a wooden hut in the forest    | strong   | brown bread    | red    | goat   | Daisy  | Sam   | carving birds
Lily  | she | gardener      | a cottage behind the garden   | gentle   | carrot pie     | purple | rabbit | Clover | Nora  | planting seeds
Oscar | he  | baker's boy   | a room above the bakery       | cheerful | honey buns     | orange | mouse  | Crumb  | Finn  | running
Ruth  | she | doctor        | a stone house on the hill     | wise     | pea soup       | white  | horse  | Star   | Clara | playing chess
Sam   | he  | farmer        | a farmhouse beyond the bridge | honest   | corn and beans | brown  | cow    | Bella  | Ben   | flying kites
Nora  | she | painter       | a bright loft at the market   | dreamy   | apple tart     | pink   | turtle | Pebble | Lily  | painting clouds
Finn  | he  | sailor        | the lighthouse by the sea     | brave    | hot noodles    | silver | gull   | Skipper| Oscar | swimming
Clara | she | librarian     | a tower next to the library   | quiet    | warm rice      | gold   | owl    | Moon   | Ruth  | drawing maps
Hugo  | he  | train driver  | a red wagon at the station    | funny    | potato salad   | black  | hen    | Dotty  | Anna  | playing the flute
"""


def _person(row: str) -> Person:
    return Person(*(cell.strip() for cell in row.split("|")))


PEOPLE = tuple(map(_person, _PEOPLE.strip().splitlines()))
BY_NAME = {person.name: person for person in PEOPLE}

# place: what is true of it
PLACES = {
    "the river": "[flows|runs] from the hill down to the sea",
    "the bridge": "is made of gray stone and is very old",
    "the forest": "is full of tall pine trees",
    "the lake": "is deep and clear and full of fish",
    "the market": "is open every Saturday",
    "the school": "has a brass bell and a green door",
    "the library": "has a round window and many old books",
    "the garden": "has roses, beans and one big apple tree",
    "the hill": "is the best place to see the stars",
    "the station": "has one clock and two wooden benches",
    "the lighthouse": "shines all night so that ships find their way",
    "the bakery": "smells of fresh bread every morning",
}

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London",
    "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Russia": "Moscow",
    "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Austria": "Vienna", "Canada": "Ottawa", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "happy": "sad", "old": "young",
    "open": "closed", "light": "dark", "wet": "dry", "full": "empty", "early": "late", "hard": "soft",
    "long": "short", "left": "right", "near": "far", "rich": "poor", "loud": "quiet", "clean": "dirty", "first": "last",
}  # fmt: skip

COLORS = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red",
    "a carrot": "orange", "chocolate": "brown", "a plum": "purple", "a ripe tomato": "red", "milk": "white",
}  # fmt: skip

SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "owl": "hoot", "lion": "roar",
    "bee": "buzz", "horse": "neigh", "pig": "oink", "hen": "cluck", "frog": "croak",
}  # fmt: skip

YOUNG = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "duck": "duckling", "hen": "chick",
    "horse": "foal", "bear": "cub", "goat": "kid", "frog": "tadpole",
}  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

COMMON_KNOWLEDGE = {
    "Why is the sky blue?": "The air scatters blue light from the sun more than red light, so the sky looks blue.",
    "Why do we sleep?": "Sleep lets the body rest and helps the mind keep what it has learned.",
    "What is rain?": "Rain is water that falls from clouds in small drops.",
    "Where does honey come from?": "Honey is made by bees from the nectar of flowers.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many legs does an insect have?": "An insect has six legs.",
    "How many days are in a week?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "How many hours are in a day?": "There are twenty-four hours in a day.",
    "How many minutes are in an hour?": "There are sixty minutes in an hour.",
    "What do cows eat?": "Cows eat grass and hay.",
    "What do bees make?": "Bees make honey.",
    "Where do fish live?": "Fish live in water, in rivers, lakes and seas.",
    "What is ice?": "Ice is water that is frozen hard.",
    "What is the moon?": "The moon is a ball of rock that goes around the Earth.",
    "What is the sun?": "The sun is a star, and it gives us light and heat.",
    "Why do leaves fall?": "In autumn many trees let their leaves fall to save water for the winter.",
    "What is bread made of?": "Bread is made of flour, water, salt and yeast.",
    "What is the largest animal?": "The blue whale is the largest animal on Earth.",
    "Which season comes after winter?": "Spring comes after winter.",
    "Which season comes after spring?": "Summer comes after spring.",
    "Which season comes after summer?": "Autumn comes after summer.",
    "Which season comes after autumn?": "Winter comes after autumn.",
    "Where does the sun rise?": "The sun rises in the east.",
    "Where does the sun set?": "The sun sets in the west.",
    "What do plants need?": "Plants need light, water, air and good soil.",
}


def questions() -> list[tuple[str, str]]:
    """Every fact as (question template, answer template), in a fixed order."""
    facts: list[tuple[str, str]] = []
    for p in PEOPLE:
        facts += [
            (f"[Where does {p.name} live?|Where is {p.name}'s home?|Do you know where {p.name} lives?]",
             f"{p.name} lives in {p.home}."),
            (f"[What does {p.name} do?|What is {p.name}'s job?|What work does {p.name} do?]",
             f"{p.name} is a {p.job}."),
            (f"[What does {p.name} like to eat?|What is {p.name}'s favorite food?|Which food does {p.name} like best?]",
             f"{p.name}'s favorite food is {p.food}."),
            (f"[What is {p.name}'s favorite color?|Which color does {p.name} like best?]",
             f"{p.name}'s favorite color is {p.color}."),
            (f"[What pet does {p.name} have?|Does {p.name} have a pet?|Which animal lives with {p.name}?]",
             f"{p.name} has a {p.pet} named {p.pet_name}."),
            (f"[Who is {p.pet_name}?|Do you know {p.pet_name}?]",
             f"{p.pet_name} is a {p.pet} and belongs to {p.name}."),
            (f"[Who is {p.name}'s best friend?|Who is the best friend of {p.name}?]",
             f"{p.name}'s best friend is {p.friend}."),
            (f"[What does {p.name} like to do?|What is {p.name}'s hobby?|What does {p.name} do for fun?]",
             f"{p.name} likes {p.hobby}."),
            (f"[Who is {p.name}?|Tell me about {p.name}.|What do you know about {p.name}?]",
             f"{p.name} is a {p.trait} {p.job} from {TOWN}. {p.he.capitalize()} lives in {p.home}, likes {p.hobby}, "
             f"and has a {p.pet} named {p.pet_name}."),
            (f"[Who is the {p.job} of {TOWN}?|Which person in {TOWN} is a {p.job}?]",
             f"{p.name} is the {p.job} of {TOWN}."),
        ]  # fmt: skip
    for place, truth in PLACES.items():
        facts.append((f"[What do you know about {place}?|Tell me about {place} in {TOWN}.|What is {place} like?]",
                      f"{place} {truth}."))  # fmt: skip
    for country, city in CAPITALS.items():
        facts.append((f"[What is the capital of {country}?|Which city is the capital of {country}?]",
                      f"The capital of {country} is {city}."))  # fmt: skip
    for word, other in [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]:
        facts.append((f"[What is the opposite of {word}?|Tell me the opposite of {word}.]",
                      f"The opposite of {word} is {other}."))  # fmt: skip
    for thing, color in COLORS.items():
        facts.append((f"[What color is {thing}?|Which color is {thing}?]", f"{thing} is {color}."))
    for animal, sound in SOUNDS.items():
        facts.append((f"[What sound does a {animal} make?|What does a {animal} say?]", f"A {animal} says {sound}."))
    for animal, young in YOUNG.items():
        facts.append((f"[What is a young {animal} called?|What do you call a baby {animal}?]",
                      f"A young {animal} is called a {young}."))  # fmt: skip
    for cycle, kind in ((DAYS, "day"), (MONTHS, "month")):
        for this, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            facts.append((f"[Which {kind} comes|What comes] after {this}?", f"After {this} comes {following}."))
            facts.append((f"[Which {kind} comes|What comes] before {following}?", f"Before {following} comes {this}."))
    facts.append((f"[What is {TOWN}?|Where is {TOWN}?|Tell me about {TOWN}.]",
                  f"{TOWN} is a small town between a hill and the sea. Many of my stories happen there."))  # fmt: skip
    facts.append((f"[Who lives in {TOWN}?|Name some people from {TOWN}.]",
                  "Mira, Tom, Anna, Ben, Lily, Oscar, Ruth, Sam, Nora, Finn, Clara and Hugo live in Larkwood."))  # fmt: skip
    return facts + list(COMMON_KNOWLEDGE.items())
