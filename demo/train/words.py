"""Word lists for the conversation generator, and the held-out split.

What it is for: names, cities, colours, list words and so on, each list in a
training part and a part that the training generator must never emit; plus
random pseudo-words and digit strings, which make copying a general skill
instead of a memory of these lists.

What it is not for: sentences and answers (see templates.py, knowledge.py).
"""
import random
import re
import zlib
from pathlib import Path


def _w(text: str) -> list[str]:
    return text.split()


def _p(text: str) -> list[str]:
    return [s.strip() for s in text.split(",")]


NAMES = _w("""Ada Ben Clara David Emma Finn Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paul Quinn Rosa Sam Tina
Uma Victor Wendy Xavier Yara Zoe Alice Bob Carol Dan Eva Frank Gina Hugo Ivan Julia Karl Lena Max Nora Olga Peter Rita
Sara Tom Ursula Vera Will Yusuf Zara Anna Bruno Chloe Diego Elena Felix Greta Hans Ingrid Jonas Kira Lucas Mia Noah
Olivia Pablo Ravi Sofia Theo Amir Bella Chen Dora Elias Fatima Goran Hana Isak Jana Kofi Lina Mateo Nadia Omar Priya
Rafael Sven Tara Wei Yuki John Mary James Linda Robert Susan Mike Lisa Mark Laura Steve Amy Kevin Helen George Ruth
Alex Chris Jenny Tim Lucy Nick Emily Daniel Sophie Adam Hannah Simon Martha Philip Zoë José Łukasz Jürgen Anaïs""")
NAMES_HELD = _w("""Margot Oliver Freya Tobias Ximena Bastian Delphine Casper Odette Leander Philippa Anton Saskia
Milo Beatrix Ruben Thea Gideon Nadine Stella""")

CITIES = _p("""Oslo, Paris, London, Berlin, Madrid, Rome, Vienna, Prague, Lisbon, Dublin, Tokyo, Kyoto, Delhi, Mumbai,
Cairo, Lagos, Nairobi, Boston, Chicago, Denver, Seattle, Austin, Toronto, Montreal, Lima, Quito, Bogota, Santiago,
Sydney, Perth, Hamburg, Munich, Zurich, Geneva, Milan, Naples, Athens, Warsaw, Krakow, Helsinki, Stockholm, Copenhagen,
Amsterdam, Brussels, New York, San Francisco, Los Angeles, Mexico City, Buenos Aires, Hong Kong, Singapore, Seoul,
Bangkok, Hanoi, Manila, Jakarta, Istanbul, Ankara, Tbilisi, Riga, Tallinn, Cologne, Lyon, Porto, Leeds, Cardiff""")
CITIES_HELD = _p("""Valencia, Bergen, Ghent, Osaka, Nashville, Adelaide, Bratislava, Casablanca, Turin, Utrecht,
Cape Town, Montevideo, Gdansk, Phoenix""")

COLORS = _w("red blue green yellow orange purple black white pink brown grey silver gold violet teal cyan magenta beige")
COLORS_HELD = _w("turquoise indigo maroon lavender crimson amber")

PETS = _w("dog cat hamster rabbit parrot goldfish turtle snake pony lizard mouse canary")
ANIMALS = _w("""tiger lion wolf fox bear eagle owl dolphin whale shark horse elephant giraffe zebra monkey panda koala
penguin otter rabbit deer hawk frog""") + PETS
ANIMALS_HELD = _w("badger falcon lynx walrus gecko heron")

FOODS = _p("""pizza, pasta, sushi, rice, soup, curry, bread, cheese, chocolate, pancakes, salad, tacos, noodles, apple
pie, ice cream, fried rice, burgers, dumplings, cake, fish, tofu, tomato soup, waffles, cookies""")
FOODS_HELD = _p("risotto, falafel, lasagna, paella, ramen, onion soup, gnocchi")

DRINKS = _p("tea, coffee, water, milk, lemonade, orange juice, cocoa, green tea, cola, apple juice")
DRINKS_HELD = _p("ginger tea, espresso, mango juice")

JOBS = _p("""teacher, doctor, nurse, pilot, baker, cook, farmer, painter, writer, singer, driver, engineer, student,
lawyer, gardener, designer, programmer, scientist, musician, plumber, dentist, builder, data analyst, bus driver""")
JOBS_HELD = _p("carpenter, librarian, surgeon, florist, photographer, tailor")

HOBBIES = _p("""chess, reading, running, swimming, painting, cooking, hiking, dancing, singing, fishing, gardening,
cycling, football, tennis, knitting, climbing, sailing, drawing, photography, skiing""")
HOBBIES_HELD = _p("archery, pottery, surfing, juggling, origami")

COUNTRIES = _p("""France, Spain, Italy, Norway, Sweden, Poland, Japan, India, Brazil, Canada, Mexico, Kenya, Egypt,
Greece, Peru, Chile, China, Ireland, Germany, Turkey""")
COUNTRIES_HELD = _p("Portugal, Iceland, Vietnam, Morocco, Uruguay, Finland")

DAYS = _w("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _w("January February March April May June July August September October November December")

WORDS = _w("""apple stone river cloud table chair window door lamp paper pencil book garden flower tree leaf forest
mountain valley ocean beach sand water fire earth wind rain snow storm thunder light shadow night morning evening summer
winter spring autumn bread butter milk honey sugar salt pepper lemon orange banana cherry grape peach plum melon carrot
potato onion tomato rice bean corn wheat horse sheep goat chicken duck eagle wolf bear fox lion tiger mouse rabbit
turtle fish whale shark boat ship train plane car bus truck bike wheel engine road bridge tunnel tower castle house
cabin tent roof wall floor carpet mirror clock watch ring crown coin gold silver iron copper glass wood silk cotton
wool leather rope chain key lock box basket bottle cup plate spoon fork knife pan oven stove kettle soap towel brush
comb shirt shoe hat coat glove scarf belt button needle thread hammer nail screw saw drill ladder bucket shovel rake
seed root branch fruit berry nut moss grass hill lake island desert jungle planet star moon sun comet rocket robot
laptop phone radio camera piano guitar drum violin flute song dance music poem story letter word number circle square
line point blue green red yellow white black brown pink happy quiet brave calm bright dark small large fast slow warm
cold soft hard sweet sour fresh old new king queen knight wizard dragon giant ghost pirate doctor teacher farmer baker
eggs cheese tea coffee juice soup salad pasta pizza cake candy ball kite doll puzzle game card dice one two three four
five six seven eight nine ten red alpha beta gamma delta cat dog bird sky tree cow pig ant bee owl frog hen zebra""")
WORDS_HELD = _w("""marble lantern walnut harbor pillow saddle trumpet velvet orchard beetle canyon feather goblet
hazel ivory jacket kernel lobster magnet nectar oyster parcel quartz ribbon saffron thistle umbrella vessel willow
acorn biscuit compass donkey ember fossil glacier hedge insect jigsaw""")

PROJECTS = _w("Aurora Phoenix Apollo Falcon Orion Atlas Nova Titan Comet Delta Echo Zenith Pixel Rocket Mercury")

HELD = {w.lower() for group in (NAMES_HELD, CITIES_HELD, COLORS_HELD, ANIMALS_HELD, FOODS_HELD, DRINKS_HELD, JOBS_HELD,
                                HOBBIES_HELD, COUNTRIES_HELD, WORDS_HELD) for w in group}
PROJECTS = [p for p in PROJECTS if p.lower() not in HELD]

_ONSET = _w("b c d f g h j k l m n p r s t v w z br cl dr fl gr kl pl pr sh sl st th tr ch qu sn sp")
_VOWEL = _w("a e i o u a e i o u ai ea ee oo ou ie y")
_CODA = [""] * 8 + _w("n r l s t m k d p x nd st rk lt ng sh ck ll")


def held_digits(s: str) -> bool:
    """Digit strings of three or more digits whose checksum falls in this class
    belong to the held-out set (about one in nine)."""
    digits = "".join(c for c in s if c.isdigit())
    return len(digits) >= 3 and zlib.crc32(digits.encode()) % 9 == 4


def digits(r: random.Random, n: int, held: bool = False) -> str:
    while True:
        s = "".join(r.choice("0123456789") for _ in range(n))
        if n < 3 or held_digits(s) == held:
            return s


# Fragments of training words: spliced together they cover the pieces that the
# tokenizer makes of real words, which syllables alone do not.
# The words of the fixed answers count too: their pieces must be free for copying.
_REAL = {w.lower() for g in (WORDS, NAMES, CITIES, FOODS, JOBS, HOBBIES, COUNTRIES, ANIMALS, COLORS, DAYS, MONTHS) for w in g if w.isalpha()}
_TEXT = " ".join(Path(__file__).with_name(n).read_text(encoding="utf-8") for n in ("knowledge.py", "templates.py"))
_REAL = sorted(_REAL | {w.lower() for w in re.findall("[A-Za-z]{3,}", _TEXT)})


def _splice(r: random.Random) -> str:
    a, b = r.choice(_REAL), r.choice(_REAL)
    if r.random() < 0.6:
        return a[:r.randint(1, len(a))] + b[r.randint(0, len(b) - 1):]
    out = ""
    for _ in range(r.randint(2, 4)):
        w = r.choice(_REAL)
        i = r.randint(0, max(0, len(w) - 2))
        out += w[i:i + r.randint(1, 4)]
    return out


def pseudo(r: random.Random, lo: int = 1, hi: int = 3) -> str:
    """A random made-up word that is not on any held-out list."""
    while True:
        if r.random() < 0.6:
            s = _splice(r)
        else:
            s = "".join(r.choice(_ONSET) + r.choice(_VOWEL) + r.choice(_CODA) for _ in range(r.randint(lo, hi)))
        if 2 < len(s) < 13 and s not in HELD:
            return s


def clock(r: random.Random, held: bool = False) -> str:
    """A time of day; the held-out ones are those at minutes 20 and 40 past."""
    if not held and r.random() < 0.25:
        return f"{r.randint(1, 12)} " + r.choice(["am", "pm", "pm", "o'clock"])
    minute = r.choice([20, 40] if held else [0, 0, 5, 10, 15, 30, 45, 50, 55, 35, 25])
    return f"{r.randint(7, 21)}:{minute:02d}"
