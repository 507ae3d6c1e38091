"""Short stories of Larkwood: a plot is a list of sentences with choices; the cast and the things are drawn once a story.

Each plot has a want, an obstacle and an ending that follows from both, so a reader (and a model) can follow it. Slots:
{n} {he} {him} {his} the hero, {m} {he2} {him2} {his2} the friend, {pet} the hero's animal by name, {home} {job} {hobby}
of the hero, {house} the home once it is known, {thing} an object, {food}, {place} and {spot}, {beast} a wild animal.
"""

# ruff: noqa: E501 (tables of sentences, one to a line)

import random
import re
from dataclasses import dataclass

from nanochat.data.builtin.templates import fill, prose
from nanochat.data.builtin.world import BY_NAME, PEOPLE, PLACES, TOWN, Person

THINGS = (
    "red kite", "silver key", "blue ball", "wooden boat", "small drum", "green hat", "brass bell", "paper lantern",
    "yellow scarf", "old map", "glass bead", "tin whistle", "golden ring", "striped umbrella", "little book", "toy train",
)  # fmt: skip
FOODS = ("bread and cheese", "apples", "honey cake", "nuts", "berries", "pancakes", "roasted corn")
BEASTS = ("fox", "hedgehog", "squirrel", "deer", "badger", "bear", "wild goose", "otter")
SPOTS = ("under a bench", "behind a big stone", "in the tall grass", "between two roots", "inside a hollow tree",
         "on a low branch", "next to an old wall", "under a pile of leaves")  # fmt: skip
OPENINGS = (
    "[One|On a] [sunny|cold|windy|bright|gray|quiet|warm] [morning|afternoon|day],",
    "[Last spring|Last summer|Last winter|One autumn day|One day in May|One Sunday],",
    "[Early in the morning|Late in the afternoon|Just after breakfast|Before the sun was up],",
    "[Once|Not long ago|Some years ago|A long time ago],",
)
INTRODUCTIONS = (
    "there [was|lived] a {trait} {job} named {n} in [the town of |]" + TOWN + ".",
    "{n} lived in {home}.",
    "{n} was a {trait} {job} who loved {hobby}.",
    "{n} had a {petkind} named {pet}.",
    "",
)


@dataclass(frozen=True)
class Plot:
    """`topic` completes "a story about ..."."""

    topic: str
    title: str
    sentences: tuple[str, ...]


def _plot(topic: str, title: str, text: str) -> Plot:
    return Plot(topic, title, tuple(line.strip() for line in text.strip().splitlines()))


PLOTS = (
    _plot("a lost {thing}", "The Lost {Thing}", """
        {opening} {n} could not find {his} {thing}.
        [It had been a gift from {m}, and {n} loved it.|{he} had played with it the day before.|{he} never went anywhere without it.]
        {he} looked [under the bed|behind the door|in every pocket], but it was not there.
        "[Where did you last have it|When did you last see it]?" asked {m}.
        {n} [thought for a while|closed {his} eyes and thought|scratched {his} head]. "[I think I had it|I played with it] at {place}," {he} said.
        So the two friends [walked|ran|hurried] to {place}.
        They [searched|looked] [everywhere|for an hour|until their feet hurt].
        [At last|Then|Suddenly], {m} saw something [shine|move|bright] {spot}.
        It was the {thing}! {n} [jumped for joy|laughed out loud|hugged {his} friend].
        "[Thank you|You have sharp eyes], {m}," {he} said. "[Two pairs of eyes are better than one|I could not have found it without you]."
        """),
    _plot("a storm", "The Storm", """
        {opening} {n} and {m} [walked|went] to {wild} to [look for berries|have a picnic|gather wood].
        [At first the sky was blue|The sun was warm when they left|There was no cloud in the sky].
        Then the wind [began to howl|grew strong], and [dark clouds came|the sky turned black].
        "[We must find shelter|We cannot get home in time]!" [cried|shouted] {m}.
        They [ran|hurried] through the rain until they found [a dry cave|an empty barn|an old hut].
        Inside sat a [wet|tired|shivering] {beast}. It [looked at them|did not run away|made room for them].
        {n} [opened {his} bag and|smiled and] shared {food} with {m} and the {beast}.
        They [told stories|sang songs|listened to the thunder] until the storm [was over|had passed].
        When the sun came out, [a rainbow stood over the hill|the whole world smelled fresh].
        The {beast} [ran back into the forest|followed them for a while], and the friends went home, wet but happy.
        """),
    _plot("sharing", "The Last Piece", """
        {opening} {n} had [some {food} in a bag|a little {food} with {him}], and {he} was very hungry.
        {he} sat down [at|near] {place} and [wanted to eat|began to eat].
        [Just then|At that moment], {m} came by. {he2} looked [sad|tired|pale].
        "[What is wrong|Why do you look so sad]?" asked {n}.
        "[I worked all day and forgot to eat|I lost my lunch on the way|I have not eaten since morning]," said {m}.
        {n} looked at {his} food. [There was not much of it.|It was just enough for one.]
        But {he} [broke it into two parts|gave half of it to {his} friend|shared it all the same].
        The next week, {n} [was ill in bed|lost {his} purse|had no time to cook].
        There was a knock at the door. It was {m}, with a [big pot of soup|warm pie|loaf of bread].
        "[You shared with me, so now I share with you|A good deed comes back]," said {m}, and both [laughed|smiled].
        """),
    _plot("being brave", "The Dark Path", """
        {n} was [afraid of|scared of] the dark, but {he} [did not tell anyone|was ashamed of it].
        {opening} {m} [fell and hurt {his2} leg|was lost] near {place}, and night was coming.
        {pet} the {petkind} [looked at {n}|stayed close to {n}], as if to say, "We have to go."
        {n} took a lantern. {his} hands [were shaking|shook], but {he} [went|walked] [out into the night|into the dark].
        [Something cracked in the bushes.|An owl called above {his} head.|The wind moved the branches.] {n} stopped.
        "[It is only the night|I am not alone|One step at a time]," {he} [whispered|told {himself}].
        [Step by step|Slowly|Bit by bit], {he} came to {place}, and there {he} found {m} [sitting on a stone|next to an old wall|under a tree].
        "[You came|I knew that you would come]!" said {m}. "[Were you not afraid|But were you not afraid|Did the dark not scare you]?"
        "[I was very afraid|Yes, I was afraid]," said {n}, "but [you needed me|I was more afraid for you]."
        From that night on, the dark was [not so dark any more|only half as dark].
        """),
    _plot("telling the truth", "The Broken {Thing}", """
        {m} had a {thing}, and {he2} was very [proud|fond] of it.
        {opening} {n} [borrowed it without asking|played with it when {m} was away].
        It [slipped from {his} hands|fell on a stone], and with a [crack|loud noise] it broke.
        {n} [hid the pieces|put the pieces] {spot} and [ran home|went away quickly].
        But that night {he} could not sleep. [{his} heart was heavy.|{he} kept thinking of {m}.]
        In the morning, {he} [went to|knocked at the door of] {m}. "[I broke your {thing}|It was me]," {he} said. "I am sorry."
        {m} was [silent for a moment|sad at first]. Then {he2} said, "[Thank you for telling me the truth|It takes courage to say that]."
        Together they [fetched glue and string|sat down at the table] and [mended it|put the pieces together].
        The {thing} [did not look new|had a few cracks now], but [both liked it even more than before|it worked again].
        """),
    _plot("a lost animal", "The Little {Beast}", """
        {opening} {n} heard a [soft|small|sad] cry near {wild}.
        {spot} sat a little {beast}, all alone. [It was cold and hungry.|It had lost its mother.]
        {n} [wrapped it in {his} coat|took it in {his} arms] and [carried it home|brought it home] to {house}.
        [{pet} the {petkind} was jealous at first, but soon they were friends.|{pet} the {petkind} kept it warm all night.]
        {n} gave it [water and {food}|{food} every day], and it [grew strong|felt better each day].
        "[It is happy here|You could keep it]," said {m}. "[But its mother must be looking for it.|But does it not belong in the wild?]"
        {n} [knew that this was true|nodded slowly]. The next day, they [took it back|went back with it] to {wild}.
        They waited [very quietly|behind a tree]. [After a while|At sunset], a big {beast} came out of the grass.
        The little one [ran to its mother|jumped with joy]. It looked back [once|one last time], as if to say thank you.
        {n} [was a little sad|had tears in {his} eyes], but {he} knew that {he} had done the right thing.
        """),
    _plot("a race", "The Great Race", """
        Every year there was a [great|big] race from {place} to {place2}.
        {opening} {n} [stood at the start|was ready to run], next to {m}. Both wanted to win the {thing}.
        "[May the best one win|I will not go easy on you]," said {m} with a [smile|laugh].
        [The bell rang|The whistle blew], and off they went. {n} was [soon ahead|faster than the wind].
        But [halfway|near the end], {he} heard a cry. {m} had [fallen into a ditch|tripped over a root].
        {n} could [see the finish|almost touch the ribbon]. {he} stopped, [sighed|thought of the prize], and ran back.
        "[Go on, you will lose|Run, or you cannot win]!" said {m}. "[Some things matter more|A prize is only a thing]," said {n}.
        They [crossed the line|came in] last, arm in arm, and [everyone clapped|the whole town cheered].
        {n} did not win the {thing}, but {he} won [something better|a friend for life].
        """),
    _plot("a seed", "The Small Seed", """
        {opening} {n} found a [tiny|strange|round] seed {spot}.
        "[What will it become|What can it be]?" {he} asked. "[Plant it and see|There is only one way to find out]," said {m}.
        So {n} [dug a hole|made a little bed of soil] near {house} and put the seed into it.
        {he} gave it water every [day|morning]. [A week passed|Two weeks went by], and nothing happened.
        "[Maybe it is dead|It will never grow]," said {n}. "[Be patient|Good things take time]," said {m}.
        [Then one day|At last], a green [leaf|tip] [came out of the earth|looked out of the ground].
        It grew and grew, until it was [taller than {n}|as high as the roof].
        In summer it [carried sweet fruit|was full of yellow flowers], and [children came to sit in its shade|bees came from far away].
        {n} [kept some of its seeds|put its seeds into a jar] and gave one to [everyone in town|every friend {he} had].
        """),
    _plot("a birthday", "A Gift for {m}", """
        {opening} {n} remembered that {m}'s birthday was [the next day|coming soon|in two days].
        {he} wanted to give {him2} something [special|nice], but {he} had [no money|only one coin].
        {he} [went to|looked around] the market, but [everything cost too much|nothing was right].
        {n} [sat down and thought|went home with empty hands]. Then {he} [had an idea|smiled].
        {he} knew that {m} liked the color {color2}. So {he} [worked all night|sat at the table until late] and made a {color2} [kite|scarf|lantern|flag].
        When the day came, {n} was [a bit nervous|a little afraid]. "[I made it myself|It is not much]," {he} said.
        {m} [opened the box slowly|looked at it for a long time]. {his2} eyes [grew wide|were shining].
        "[It is the best gift of all|Nobody ever made something for me]," {he2} said.
        Then they [ate {food2}|had {food2}] together, and [danced|laughed] until [the stars came out|it was late].
        """),
    _plot("building a boat", "The Boat That Sank", """
        {n} and {m} wanted to [see the island|cross the water|sail to the other side].
        {opening} they [took some planks and nails|gathered wood] and built a boat.
        They [painted it|gave it a coat of paint], [put up a sail|made two oars], and pushed it into the water.
        For a moment it [floated|looked fine]. Then it [filled with water|tipped over], and [down it went|it sank].
        {m} [stood there, dripping|was close to tears]. "[It was all for nothing|We will never do it]," {he2} said.
        "[No, now we know what went wrong|We only have to find the hole]," said {n}. [{pet} the {petkind} agreed.|They both began to laugh.]
        They [asked an old sailor for advice|tried again and worked with more care], and closed every gap with [tar|wax].
        The second boat [did not sink|stayed dry]. It carried them [far out|across the water] in the evening light.
        "[We learned more from the first boat|The first boat was a good teacher]," said {n}.
        """),
    _plot("a strange noise", "The Noise at Night", """
        {opening} there was a strange noise [in|near] {house}.
        [Tap, tap, tap|Scratch, scratch, scratch|Thump, thump, thump], it went. {n} [sat up in bed|held {his} breath].
        "[Is someone there|Who is there]?" {he} called. [Nobody answered.|The noise stopped, then it began again.]
        {n} [fetched|ran to] {m}, and together they [took a lamp|lit a candle] and [looked outside|went to look].
        "[It may be a ghost,|What if it is a thief?]" whispered {m}. "[There are no ghosts|Let us look first]," said {n}.
        They [opened the door slowly|looked around the corner]. Two [bright|round] eyes looked back at them.
        It was a {beast}, and it [was eating|had found] the {food}!
        {n} and {m} looked at each other and [laughed until they could not stand|began to laugh].
        They gave [the guest|the {beast}] a bit more, and from then on it came [every night|once a week].
        """),
    _plot("learning something new", "Day After Day", """
        {n} wanted to learn to [play the {instrument}|play the {instrument} well].
        {opening} {he} tried for the first time. It sounded [terrible|like a sick goose]. [{pet} the {petkind} ran away.|Even {pet} the {petkind} hid.]
        "[I cannot do it|I have no talent]," said {n} and [put the {instrument} away|sat down in a corner].
        "[Nobody can do it on the first day|You cannot do it yet]," said {m}. "[Play a little every day|Try again tomorrow]."
        So {n} played [every evening|each day] at {place}, [in sun and in rain|where nobody could hear {him}].
        [After a month|Week by week], it sounded [better|less like a goose and more like a song].
        In the autumn there was a feast at {place2}, and {n} [played for everyone|stepped onto the stage].
        When {he} was done, it was quiet. Then [all the people clapped|the whole town cheered].
        "[How did you do that|Where did you learn that]?" asked a child. "[A little every day|One wrong note at a time]," said {n}.
        """),
    _plot("the snow", "The First Snow", """
        {opening} the first snow fell on {town}. [The roofs were white.|Everything was still.]
        {n} [put on {his} boots|took {his} warm coat] and ran to {place}, where {m} was waiting.
        They [made|built] a snowman with [a carrot for a nose|two buttons for eyes]. "[He looks cold|He needs something]," said {m}.
        So {n} gave the snowman {his} [old hat|scarf].
        In the evening they saw a [small bird|tiny bird] in the snow. It [could not fly|was too cold to sing].
        {m} [held it in {his2} hands|warmed it], while {n} [ran home and fetched|fetched] [seeds|crumbs].
        They put the bird into the snowman's [hat|scarf], out of the wind, and [went home|said good night].
        In the morning the bird [sang|was singing] on the snowman's head, and [that was the start of a lovely winter|nobody had to be cold].
        """),
    _plot("a letter", "The Letter", """
        {opening} {n} found a letter {spot} near {place}. There was no name on it.
        "[Meet me at {place2} at noon|Come to {place2} before dark]," it said. "[Bring a friend|Do not come alone]."
        {n} [was curious|could not wait], so {he} [called|asked] {m}, and they [set off|went there] together.
        At {place2} they found [another letter|a second letter]. "[Look {spot2}|You are close. Look {spot2}]," it said.
        They looked, and there was a box with a {thing} in it, [and a note|and a last letter].
        "[For the ones who go together|A treasure is for sharing]," the note said. It was from [the mayor|an old neighbor], who [liked riddles|loved a good game].
        {n} and {m} [took turns with the {thing}|kept the {thing} at {house}, where both could use it].
        The next day they [wrote a letter of their own|hid a new letter] for [the next finder|someone else to find].
        """),
)  # fmt: skip

ENDINGS = ("", "", "", "[And that is the end.|The end.]", "[It was a good day|That was a day to remember] in " + TOWN + ".",
           "{n} [never forgot that day|often told this story].", "{n} and {m} are [the best of friends|good friends] to this day.")  # fmt: skip
WILD = ("the forest", "the lake", "the river", "the hill")
INSTRUMENTS = ("flute", "drum", "violin", "trumpet", "harp")


def _slots(plot: Plot, hero: Person, friend: Person, rng: random.Random, thing: str | None) -> dict[str, str]:
    thing = thing or rng.choice(THINGS)
    place, place2 = rng.sample(list(PLACES), 2)
    spot, spot2 = rng.sample(SPOTS, 2)
    beast = rng.choice(BEASTS)
    return {
        "n": hero.name, "he": hero.he, "him": hero.him, "his": hero.his, "himself": hero.him + "self",
        "m": friend.name, "he2": friend.he, "him2": friend.him, "his2": friend.his,
        "pet": hero.pet_name, "petkind": hero.pet, "home": hero.home, "job": hero.job, "hobby": hero.hobby,
        "trait": hero.trait, "color2": friend.color, "food2": friend.food,
        "thing": thing, "Thing": thing.title(), "food": rng.choice(FOODS), "beast": beast, "Beast": beast.title(),
        "place": place, "wild": rng.choice(WILD), "house": re.sub("^a ", "the ", hero.home), "place2": place2, "spot": spot, "spot2": spot2, "town": TOWN,
        "instrument": rng.choice(INSTRUMENTS), "opening": rng.choice(OPENINGS),
    }  # fmt: skip


def story(
    rng: random.Random, plot: Plot | None = None, hero: str | None = None, thing: str | None = None
) -> tuple[str, str]:
    """A story as (title, text); what is not given is drawn."""
    plot = plot or rng.choice(PLOTS)
    person = BY_NAME[hero] if hero else rng.choice(PEOPLE)
    friend = BY_NAME[person.friend] if rng.random() < 0.4 else rng.choice([p for p in PEOPLE if p is not person])
    slots = _slots(plot, person, friend, rng, thing)
    introduction = rng.choice(INTRODUCTIONS)
    sentences = [introduction, *plot.sentences, rng.choice(ENDINGS)]
    return fill(plot.title, rng, slots), prose(sentences, rng, slots)


def topic(plot: Plot, rng: random.Random, thing: str) -> str:
    """What a story of this plot is about, as a user would ask for it."""
    return fill(plot.topic, rng, {"thing": thing})


def portrait(rng: random.Random, person: Person) -> str:
    """A paragraph about one person, true to the tables, in varied words and order."""
    p = person
    sentences = [
        f"{p.name} is the {p.job} of {TOWN}.",
        f"[{p.he} lives in|{p.name} lives in|{p.his} home is] {p.home}.",
        f"{p.he} is [very |]{p.trait} and likes {p.hobby}.",
        f"{p.his} favorite food is {p.food}, and {p.his} favorite color is {p.color}.",
        f"{p.he} has a {p.pet} named {p.pet_name}. [{p.pet_name} and {p.name} are always together.|]",
        f"{p.his} best friend is {p.friend}.",
    ]
    first, rest = sentences[0], sentences[1:]
    rng.shuffle(rest)
    return prose([first, *rest], rng, {}).strip()
