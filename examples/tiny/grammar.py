"""A grammar of children's stories.

`tell(random)` makes up a story: it draws a cast (a child, a friend, a thing, a
place, ...), which stays the same through the story, and one of the plots, and
then expands the plot's symbols until only words are left.
"""

import re

GIRLS = "Lily Mia Anna Sara Zoe Lucy Emma Ruby Nora Ella Rosie Ivy".split()
BOYS = "Tom Ben Max Sam Leo Jack Tim Finn Noah Oscar Theo Milo".split()
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
FRIENDS = {
    "dog": ("Rex", "Spot", "Buddy", "Biscuit"),
    "cat": ("Mittens", "Tiger", "Luna", "Socks"),
    "rabbit": ("Hopper", "Clover", "Snow", "Button"),
    "duck": ("Puddle", "Quack", "Daisy", "Waddle"),
    "mouse": ("Pip", "Nibble", "Crumb", "Squeak"),
    "bear": ("Bruno", "Honey", "Bobo", "Cocoa"),
    "fox": ("Rusty", "Amber", "Sly", "Maple"),
    "hedgehog": ("Prickle", "Hazel", "Pine", "Olly"),
}
FAMILY = ("mom", "dad", "grandma", "grandpa")
COLORS = "red blue green yellow purple silver white pink".split()
THINGS = "ball kite hat boat drum car doll scarf cup bell book balloon".split()
PLACES = {
    "park": "at the park",
    "garden": "in the garden",
    "forest": "in the forest",
    "beach": "on the beach",
    "farm": "on the farm",
    "river": "by the river",
    "hill": "on the hill",
    "pond": "by the pond",
}
FOODS = "cake soup bread jam cookies apples berries pancakes".split()
SKILLS = "swim sing paint dance climb skate juggle whistle".split()
ADJECTIVES = "kind brave curious happy clever gentle cheerful little".split()
FEARS = {
    "the dark": "The dark is only the day with its eyes closed",
    "the thunder": "The thunder is only the clouds clapping their hands",
    "the wind": "The wind is only the sky singing a song",
    "the big bridge": "The big bridge is only a road over the water",
}
SEEDS = "flower tree pumpkin sunflower bean carrot".split()
PETS = "bird kitten puppy turtle butterfly frog".split()
BUILDINGS = "house tower castle bridge boat tent".split()

# A symbol -> what it can become. <symbol> is expanded in turn, {name} is
# filled in from the cast.
GRAMMAR = {
    "story": [
        "<lost>",
        "<share>",
        "<afraid>",
        "<rescue>",
        "<learn>",
        "<grow>",
        "<party>",
        "<build>",
        "<sorry>",
        "<find>",
    ],  # fmt: skip
    "opening": [
        "Once upon a time, there was a {adjective} {kind} named {hero}.",
        "One day, a {adjective} {kind} named {hero} went outside.",
        "There once was a {adjective} {kind} whose name was {hero}.",
        "{hero} was a {adjective} {kind} who lived near the {place}.",
    ],
    "friend": [
        "{Her} best friend was a {animal} named {friend}.",
        "{She} had a friend, a {animal} named {friend}.",
        "{hero} liked to play with {friend} the {animal}.",
    ],
    "weather": [
        "The sun was warm and the sky was blue.",
        "It was a bright and sunny morning.",
        "The birds were singing in the trees.",
        "Soft white clouds were in the sky.",
    ],
    "together": [
        "They ran and played {at_place} all day.",
        "They played {at_place} until the sun went down.",
        "Then they sat {at_place} and laughed.",
    ],
    "sad": [
        "{hero} was very sad and began to cry.",
        "{hero} felt sad. A big tear ran down {her} cheek.",
        "{hero} sat down and did not want to play.",
    ],
    "thanks": [
        '"Thank you, {friend}!" said {hero}.',
        '{hero} gave {friend} a big hug. "Thank you!" {she} said.',
        '"You are the best friend in the world," said {hero}.',
    ],
    "end": [
        "They were happy all day long.",
        "And from that day on, they were even better friends.",
        "{hero} went to bed with a big smile.",
        "It was the best day ever.",
        "They all lived happily ever after.",
    ],
    # Plots.
    "lost": [
        "<opening> {She} had a {color} {thing} that {she} loved very much. "
        "<lose>\n\n<friend> <help>\n\n<found> <thanks> <end>",
    ],
    "lose": [
        "One day, {hero} could not find the {color} {thing}. <sad>",
        "But one morning, the {color} {thing} was gone. <sad>",
        "One day {she} played {at_place} and lost the {color} {thing}. <sad>",
    ],
    "help": [
        '"Do not cry," said {friend}. "I will help you look for it."',
        '{friend} saw {hero} and asked, "Why are you sad?" "I lost my '
        '{thing}," said {hero}. "Let us look for it together," said {friend}.',
        '"I have a good nose," said {friend}. "I can find your {thing}!"',
    ],
    "found": [
        "They looked under the bed and behind the door. At last, {friend} "
        "found the {color} {thing} {at_place}.",
        "They looked here and there. Then {friend} saw something {color} "
        "{at_place}. It was the {thing}!",
        "They walked a long way. And there it was! The {color} {thing} was "
        "{at_place}.",
    ],
    "share": [
        "<opening> {Her} {family} gave {her_object} some {food}. {She} was "
        "very happy.\n\n<friend> {friend} was hungry. <ask>\n\n<give> "
        "<together> <end>",
    ],
    "ask": [
        '"May I have some of your {food}?" asked {friend}.',
        '{friend} looked at the {food}. "It smells so good," said {friend}.',
        '"I have nothing to eat today," said {friend}.',
    ],
    "give": [
        "{hero} wanted to keep all of the {food}. But then {she} saw that "
        '{friend} was sad. "Here, we can share," said {hero}.',
        '"Yes, let us share the {food}," said {hero}. {She} gave half of it '
        "to {friend}.",
        '{hero} thought about it. "Sharing is more fun," {she} said, and gave '
        "{friend} some {food}.",
    ],
    "afraid": [
        "<opening> {She} was afraid of {fear}. <hide>\n\n{Her} {family} came "
        "and sat down next to {her_object}. <comfort>\n\n<brave>",
    ],
    "hide": [
        "One night, {she} hid under the blanket and could not sleep.",
        "{She} closed {her} eyes and held {her} {color} {thing} very tight.",
        'One day, {she} began to shake. "I want to go home," {she} said.',
    ],
    "comfort": [
        '"{fear_answer}," said {her} {family}. "I am here with you."',
        '"Do not be afraid," said {her} {family}. "{fear_answer}."',
        '"I was afraid of {fear}, too, when I was small," said {her} '
        '{family}. "{fear_answer}."',
    ],
    "brave": [
        "{hero} took a deep breath and opened {her} eyes. {She} was not "
        "afraid of {fear} any more. {Her} {family} was very proud.",
        '{hero} smiled. "I can be brave," {she} said. And {she} was never '
        "afraid of {fear} again.",
        "{hero} held the hand of {her} {family} and felt brave. Soon {she} "
        "was not afraid of {fear} at all.",
    ],
    "rescue": [
        "<opening> <weather> {hero} was walking {at_place}. {She} saw a "
        "little {pet}. <hurt>\n\n<carry> {Her} {family} helped {her_object}. "
        "<heal>\n\n<free>",
    ],
    "hurt": [
        "The {pet} was hurt and could not move.",
        "The {pet} was stuck between two stones.",
        "The {pet} was cold and wet and all alone.",
    ],
    "carry": [
        '"Do not worry, little {pet}," said {hero}. {She} carried it home.',
        "{hero} picked the {pet} up very gently and took it home.",
        '"I will help you," said {hero}, and put the {pet} in {her} hat.',
    ],
    "heal": [
        "They gave the {pet} some water and a warm bed.",
        "They made a small bed for the {pet} in a box.",
        "They fed the {pet} every day, and it grew strong.",
    ],
    "free": [
        "After some days, the {pet} was well again. {hero} took it back to "
        "the {place}. The {pet} looked back once, as if to say thank you.",
        "Soon the {pet} was well. It did not want to go away. So it stayed "
        "with {hero}, and they became friends.",
        "One morning, the {pet} was strong again. {hero} was sad to say "
        "goodbye, but {she} was happy for the {pet}.",
    ],
    "learn": [
        "<opening> {She} wanted to {skill}, but {she} did not know how. "
        "<fail>\n\n<friend> <teach>\n\n<succeed> <end>",
    ],
    "fail": [
        '{She} tried and tried. "I will never {skill}," {she} said.',
        "{She} tried to {skill} all day, but it was too hard. <sad>",
        '{She} tried once and gave up. "It is too hard," {she} said.',
    ],
    "teach": [
        '"I can show you how to {skill}," said {friend}. "You only have to '
        'try a little every day."',
        '"Do not give up," said {friend}. "I will help you."',
        '{friend} said, "When I was small, I could not {skill}, too. Try '
        'again!"',
    ],
    "succeed": [
        "So {hero} tried again, every day. And one day {she} could {skill}! "
        '"Look, I can do it!" {she} said.',
        "{hero} and {friend} went to the {place} every day. After a week, "
        "{hero} could {skill} very well.",
        "{hero} tried one more time. It worked! {She} could {skill}. "
        "{friend} was so proud.",
    ],
    "grow": [
        "<opening> {Her} {family} gave {her_object} a tiny seed. <plant>\n\n"
        "<wait>\n\n<bloom>",
    ],
    "plant": [
        "{hero} put the seed into the ground and gave it some water.",
        '"Put it in the ground and be patient," said {her} {family}.',
        "{She} made a little hole {at_place} and put the seed into it.",
    ],
    "wait": [
        'Every day, {hero} went to look. But there was nothing. "Why does '
        'it not grow?" {she} asked. "You have to wait," said {her} {family}.',
        "{hero} waited and waited. It rained, and then the sun came out.",
        "Days went by, and {hero} gave it water every morning.",
    ],
    "bloom": [
        "One morning, there was a little green leaf. It grew and grew, and "
        "then it was a big {seed}! {hero} was so happy that {she} danced.",
        'Then, one day, {she} saw a beautiful {seed}. "I made it grow!" '
        "said {hero}. {Her} {family} smiled.",
        "At last, a {color} {seed} stood there in the sun. {hero} showed it "
        "to everyone. {She} had learned to be patient.",
    ],
    "party": [
        "<opening> <friend> It was the birthday of {friend}. <plan>\n\n"
        "<surprise>\n\n<thanks_back> <end>",
    ],
    "plan": [
        "{hero} wanted to make a surprise. {She} made some {food} and found "
        "a {color} {thing}.",
        '"I will give {friend} a {color} {thing}," said {hero}. {Her} '
        "{family} made some {food}.",
        "{hero} asked {her} {family} for help. They made {food} and put a "
        "{color} {thing} in a box.",
    ],
    "surprise": [
        'When {friend} came to the {place}, {hero} jumped up. "Surprise!" '
        "{she} said. {friend} opened the box. It was a {color} {thing}!",
        'They hid {at_place} and waited. Then {friend} came. "Happy '
        'birthday!" they all said. {friend} got the {color} {thing} and '
        "jumped with joy.",
    ],
    "thanks_back": [
        '"Thank you, {hero}!" said {friend}. They ate the {food} together.',
        '"I have always wanted a {color} {thing}!" said {friend}. Then they '
        "ate all of the {food}.",
    ],
    "build": [
        "<opening> <friend> <weather> They wanted to build a {building} "
        "{at_place}. <work>\n\n<break>\n\n<again> <end>",
    ],
    "work": [
        "{hero} brought some sticks and {friend} brought some stones.",
        "They worked hard all morning.",
        '"I will hold it and you can push," said {hero}.',
    ],
    "break": [
        "But then a strong wind came, and the {building} fell down. <sad>",
        "But the {building} was too tall. Crash! It fell down. <sad>",
        "Then it began to rain, and the {building} broke. <sad>",
    ],
    "again": [
        '"We can build it again," said {friend}. "And this time it will be '
        'better." They worked together, and soon the {building} was strong.',
        '{friend} was not sad. "Let us try again!" said {friend}. This time, '
        "they helped each other, and the {building} did not fall.",
    ],
    "sorry": [
        "<opening> <friend> {friend} had a {color} {thing}. One day, {hero} "
        "took the {thing} and did not ask. <oops>\n\n<confess>\n\n<forgive> "
        "<end>",
    ],
    "oops": [
        "{She} ran too fast, and the {thing} broke.",
        "{She} dropped it, and the {thing} broke. Oh no!",
        "{She} fell down, and the {thing} broke in two.",
    ],
    "confess": [
        "{hero} wanted to hide. But {she} knew that it was not right. {She} "
        'went to {friend} and said, "I am sorry. I broke your {thing}."',
        '{hero} told {her} {family}. "You must tell the truth," said {her} '
        '{family}. So {hero} went to {friend}. "I broke your {thing}. I am '
        'sorry," {she} said.',
    ],
    "forgive": [
        '{friend} was sad, but not angry. "Thank you for telling me the '
        'truth," said {friend}. They fixed the {thing} together.',
        '"It is okay," said {friend}. "We can fix it." And they fixed the '
        "{color} {thing} with some glue.",
    ],
    "find": [
        "<opening> <weather> {hero} went to the {place} and found a {color} "
        "{thing}. <whose>\n\n<search>\n\n<return> <end>",
    ],
    "whose": [
        '"Whose {thing} is this?" {she} asked.',
        "There was no one near it.",
        '"It is so pretty," {she} said. "Someone must miss it."',
    ],
    "search": [
        "{She} walked on and met a {animal} named {friend}. {friend} was "
        'crying. "I lost my {thing}," said {friend}.',
        "Then {she} heard someone cry. It was a {animal} named {friend}. "
        '"I cannot find my {color} {thing}," said {friend}.',
    ],
    "return": [
        '"Is this your {thing}?" asked {hero}. "Yes!" said {friend}. "You '
        'are so kind!" {hero} and {friend} became friends. <together>',
        "{hero} gave the {thing} back. {friend} was so happy and asked, "
        '"Do you want to play with me?" <together>',
    ],
}
SYMBOL = re.compile(r"<(\w+)>")


def tell(random):
    """Makes up a story.

    Args:
        random: `random.Random`.

    Returns:
        str. A story of about 100 words in three paragraphs.
    """
    return _expand("story", random).format(**_cast(random))


def _expand(symbol, random):
    """Replaces a symbol, and those in what it becomes, until none is left."""
    text = random.choice(GRAMMAR[symbol])
    return SYMBOL.sub(lambda match: _expand(match[1], random), text)


def _cast(random):
    """Who and what the story is about, by name."""
    kind = random.choice(list(PRONOUNS))
    she, her_object, her = PRONOUNS[kind]
    animal = random.choice(list(FRIENDS))
    place = random.choice(list(PLACES))
    fear = random.choice(list(FEARS))
    return {
        "hero": random.choice(GIRLS if kind == "girl" else BOYS),
        "kind": kind,
        "she": she,
        "She": she.capitalize(),
        "her": her,
        "Her": her.capitalize(),
        "her_object": her_object,
        "animal": animal,
        "friend": random.choice(FRIENDS[animal]),
        "place": place,
        "at_place": PLACES[place],
        "fear": fear,
        "fear_answer": FEARS[fear],
        "family": random.choice(FAMILY),
        "color": random.choice(COLORS),
        "thing": random.choice(THINGS),
        "food": random.choice(FOODS),
        "skill": random.choice(SKILLS),
        "adjective": random.choice(ADJECTIVES),
        "seed": random.choice(SEEDS),
        "pet": random.choice(PETS),
        "building": random.choice(BUILDINGS),
    }
