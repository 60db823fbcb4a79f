"""The lists behind the suite `general-cloze`, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Draft(NamedTuple):
    """A prompt, its right next word, and wrong ones, the most tempting first."""

    prompt: str
    right: str
    wrong: Sequence[str]


CONTINENTS = ("Europe", "Asia", "Africa")

CAPITALS: dict[str, tuple[str, str]] = {
    "France": ("Paris", "Europe"), "Germany": ("Berlin", "Europe"), "Italy": ("Rome", "Europe"),
    "Spain": ("Madrid", "Europe"), "England": ("London", "Europe"), "Ireland": ("Dublin", "Europe"),
    "Austria": ("Vienna", "Europe"), "Hungary": ("Budapest", "Europe"), "Greece": ("Athens", "Europe"),
    "Norway": ("Oslo", "Europe"), "Sweden": ("Stockholm", "Europe"), "Denmark": ("Copenhagen", "Europe"),
    "Finland": ("Helsinki", "Europe"), "Poland": ("Warsaw", "Europe"), "Portugal": ("Lisbon", "Europe"),
    "Belgium": ("Brussels", "Europe"), "Scotland": ("Edinburgh", "Europe"), "Ukraine": ("Kiev", "Europe"),
    "Czechia": ("Prague", "Europe"), "Switzerland": ("Bern", "Europe"), "the Netherlands": ("Amsterdam", "Europe"),
    "Russia": ("Moscow", "Europe"), "Serbia": ("Belgrade", "Europe"), "Bulgaria": ("Sofia", "Europe"),
    "Romania": ("Bucharest", "Europe"), "Croatia": ("Zagreb", "Europe"),
    "Japan": ("Tokyo", "Asia"), "China": ("Beijing", "Asia"), "India": ("Delhi", "Asia"), "Iran": ("Tehran", "Asia"),
    "Iraq": ("Baghdad", "Asia"), "Syria": ("Damascus", "Asia"), "Thailand": ("Bangkok", "Asia"),
    "Vietnam": ("Hanoi", "Asia"), "South Korea": ("Seoul", "Asia"), "Nepal": ("Kathmandu", "Asia"),
    "Turkey": ("Ankara", "Asia"), "Lebanon": ("Beirut", "Asia"), "Israel": ("Jerusalem", "Asia"),
    "Indonesia": ("Jakarta", "Asia"), "the Philippines": ("Manila", "Asia"), "Afghanistan": ("Kabul", "Asia"),
    "Pakistan": ("Islamabad", "Asia"), "Taiwan": ("Taipei", "Asia"), "Mongolia": ("Ulan", "Asia"),
    "Egypt": ("Cairo", "Africa"), "Kenya": ("Nairobi", "Africa"), "Ethiopia": ("Addis", "Africa"),
    "Ghana": ("Accra", "Africa"), "Uganda": ("Kampala", "Africa"), "Tanzania": ("Dodoma", "Africa"),
    "Tunisia": ("Tunis", "Africa"), "Libya": ("Tripoli", "Africa"), "Sudan": ("Khartoum", "Africa"),
    "Nigeria": ("Abuja", "Africa"), "Zimbabwe": ("Harare", "Africa"), "Morocco": ("Rabat", "Africa"),
    "Algeria": ("Algiers", "Africa"), "Senegal": ("Dakar", "Africa"), "Zambia": ("Lusaka", "Africa"),
    "Canada": ("Ottawa", "America"), "Cuba": ("Havana", "America"), "Peru": ("Lima", "America"),
    "Chile": ("Santiago", "America"), "Argentina": ("Buenos", "America"), "Colombia": ("Bogota", "America"),
    "Jamaica": ("Kingston", "America"), "the United States": ("Washington", "America"),
    "Brazil": ("Brasilia", "America"), "Mexico": ("Mexico", "America"), "Ecuador": ("Quito", "America"),
    "Venezuela": ("Caracas", "America"),
}  # fmt: skip

FACTS = tuple(Draft(prompt, right, [wrong]) for prompt, right, wrong in (
    ("The Earth goes around the", "Sun", "Moon"), ("The planet with the famous rings is", "Saturn", "Mars"),
    ("The largest planet of the solar system is", "Jupiter", "Venus"), ("The red planet is called", "Mars", "Neptune"),
    ("The currency of Japan is the", "yen", "euro"), ("The currency of Germany is the", "euro", "pound"),
    ("The currency of the United States is the", "dollar", "pound"), ("Water freezes into", "ice", "steam"),
    ("Boiling water turns into", "steam", "ice"), ("The chemical symbol H stands for", "hydrogen", "oxygen"),
    ("The chemical symbol O stands for", "oxygen", "carbon"), ("The chemical symbol C stands for", "carbon", "nitrogen"),
    ("The chemical symbol Au stands for", "gold", "silver"), ("The chemical symbol Fe stands for", "iron", "lead"),
    ("Table salt is made of chlorine and", "sodium", "iron"), ("The theory of relativity is due to Albert", "Einstein", "Newton"),
    ("The laws of motion were found by Isaac", "Newton", "Darwin"), ("The theory of evolution is due to Charles", "Darwin", "Einstein"),
    ("Romeo and Juliet was written by William", "Shakespeare", "Newton"), ("The Mona Lisa was painted by Leonardo da", "Vinci", "Rome"),
    ("Bees make", "honey", "milk"), ("Cows give us", "milk", "honey"), ("Hens lay", "eggs", "milk"),
    ("Sheep give us", "wool", "eggs"), ("Spiders spin a", "web", "nest"), ("Birds build a", "nest", "web"),
    ("The heart pumps", "blood", "air"), ("The lungs fill with", "air", "blood"), ("We smell with the", "nose", "ear"),
    ("We see with the", "eyes", "ears"), ("We hear with the", "ears", "eyes"), ("We chew with the", "teeth", "hair"),
    ("A person who flies a plane is called a", "pilot", "driver"), ("A person who writes books is called an", "author", "actor"),
    ("A person who teaches at school is called a", "teacher", "doctor"), ("A person who treats the sick is called a", "doctor", "lawyer"),
    ("A person who cooks in a restaurant is called a", "chef", "judge"), ("A person who paints pictures is called an", "artist", "engineer"),
    ("A person who plays the piano is a", "musician", "farmer"), ("A person who grows wheat is a", "farmer", "musician"),
    ("A baby cat is called a", "kitten", "puppy"), ("A baby dog is called a", "puppy", "kitten"),
    ("A baby cow is called a", "calf", "kitten"), ("A baby sheep is called a", "lamb", "calf"),
    ("The season after winter is", "spring", "autumn"), ("The season after spring is", "summer", "winter"),
    ("The first month of the year is", "January", "March"), ("The last month of the year is", "December", "November"),
    ("The sun rises in the", "east", "west"), ("The sun sets in the", "west", "east"),
    ("Grass is", "green", "red"), ("Snow is", "white", "black"), ("The colour of blood is", "red", "blue"),
    ("On a clear day the sky is", "blue", "green"), ("Coal is", "black", "white"), ("A ripe banana is", "yellow", "blue"),
    ("Plants take in carbon dioxide and give off", "oxygen", "nitrogen"), ("Most of the air is", "nitrogen", "oxygen"),
    ("The hardest natural material is", "diamond", "gold"), ("The Great Wall is in", "China", "Japan"),
    ("The Eiffel Tower is in", "Paris", "London"), ("The Colosseum is in", "Rome", "Madrid"),
    ("Big Ben is in", "London", "Berlin"), ("The Kremlin is in", "Moscow", "Rome"),
    ("The pyramids of Giza are in", "Egypt", "Greece"), ("The Taj Mahal is in", "India", "China"),
    ("The language of Brazil is", "Portuguese", "Spanish"), ("The language of Austria is", "German", "French"),
    ("The language of Mexico is", "Spanish", "Portuguese"), ("The language of Egypt is", "Arabic", "Greek"),
    ("The ocean between Europe and America is the", "Atlantic", "Pacific"),
    ("The ocean between Asia and America is the", "Pacific", "Atlantic"),
    ("An hour has sixty", "minutes", "days"), ("A minute has sixty", "seconds", "hours"), ("A week has seven", "days", "months"),
    ("A century is a hundred", "years", "days"), ("A triangle has three", "sides", "circles"),
    ("The shape of a ball is a", "sphere", "cube"), ("The shape of dice is a", "cube", "sphere"),
))  # fmt: skip

_ADJECTIVES = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("old", "young"), ("rich", "poor"),
    ("strong", "weak"), ("wet", "dry"), ("clean", "dirty"), ("happy", "sad"), ("hard", "soft"), ("light", "dark"),
    ("full", "empty"), ("open", "closed"), ("early", "late"), ("easy", "difficult"), ("cheap", "expensive"),
    ("thick", "thin"), ("wide", "narrow"), ("deep", "shallow"), ("loud", "quiet"), ("heavy", "light"),
    ("new", "old"), ("good", "bad"), ("right", "wrong"), ("true", "false"), ("alive", "dead"), ("brave", "afraid"),
    ("sharp", "dull"), ("smooth", "rough"), ("sweet", "bitter"), ("safe", "dangerous"), ("public", "private"),
    ("simple", "complex"), ("common", "rare"), ("ancient", "modern"), ("guilty", "innocent"), ("polite", "rude"),
    ("tight", "loose"), ("male", "female"), ("major", "minor"), ("internal", "external"), ("positive", "negative"),
    ("maximum", "minimum"), ("high", "low"), ("near", "far"), ("active", "passive"), ("permanent", "temporary"),
    ("natural", "artificial"), ("flexible", "rigid"), ("fresh", "stale"), ("kind", "cruel"), ("wise", "foolish"),
    ("proud", "humble"), ("cheerful", "gloomy"), ("awake", "asleep"), ("absent", "present"), ("visible", "invisible"),
)  # fmt: skip
_VERBS = (
    ("buy", "sell"), ("give", "take"), ("win", "lose"), ("push", "pull"), ("start", "stop"), ("love", "hate"),
    ("laugh", "cry"), ("arrive", "leave"), ("build", "destroy"), ("remember", "forget"), ("increase", "decrease"),
    ("attack", "defend"), ("accept", "reject"), ("save", "spend"), ("float", "sink"), ("raise", "lower"),
    ("import", "export"), ("succeed", "fail"), ("expand", "contract"), ("live", "die"), ("borrow", "lend"),
    ("begin", "end"), ("allow", "forbid"), ("praise", "blame"), ("hide", "reveal"), ("join", "separate"),
)  # fmt: skip
_OTHERS = (
    ("up", "down"), ("left", "right"), ("north", "south"), ("east", "west"), ("day", "night"), ("war", "peace"),
    ("friend", "enemy"), ("front", "back"), ("top", "bottom"), ("inside", "outside"), ("before", "after"),
    ("above", "below"), ("always", "never"), ("more", "less"), ("many", "few"), ("life", "death"),
    ("summer", "winter"), ("heaven", "hell"), ("question", "answer"), ("victory", "defeat"), ("profit", "loss"),
    ("question", "answer"), ("king", "queen"), ("entrance", "exit"), ("success", "failure"), ("truth", "lie"),
)  # fmt: skip
OPPOSITES = (_ADJECTIVES, _VERBS, _OTHERS)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

SUBJECTS = (
    ("key", "keys"), ("cabinet", "cabinets"), ("picture", "pictures"), ("student", "students"), ("teacher", "teachers"),
    ("window", "windows"), ("car", "cars"), ("house", "houses"), ("dog", "dogs"), ("cat", "cats"), ("bird", "birds"),
    ("tree", "trees"), ("book", "books"), ("letter", "letters"), ("child", "children"), ("man", "men"),
    ("woman", "women"), ("boy", "boys"), ("girl", "girls"), ("farmer", "farmers"), ("doctor", "doctors"),
    ("lawyer", "lawyers"), ("report", "reports"), ("computer", "computers"), ("table", "tables"), ("chair", "chairs"),
    ("river", "rivers"), ("mountain", "mountains"), ("city", "cities"), ("village", "villages"), ("ship", "ships"),
    ("plane", "planes"), ("train", "trains"), ("bridge", "bridges"), ("road", "roads"), ("garden", "gardens"),
    ("flower", "flowers"), ("apple", "apples"), ("horse", "horses"), ("cow", "cows"), ("king", "kings"),
    ("soldier", "soldiers"), ("actor", "actors"), ("singer", "singers"), ("painting", "paintings"), ("song", "songs"),
    ("story", "stories"), ("machine", "machines"), ("engine", "engines"), ("wall", "walls"), ("door", "doors"),
    ("lamp", "lamps"), ("clock", "clocks"), ("bottle", "bottles"), ("box", "boxes"), ("shirt", "shirts"),
    ("shoe", "shoes"), ("hat", "hats"), ("coat", "coats"), ("knife", "knives"), ("plate", "plates"), ("cup", "cups"),
    ("bag", "bags"), ("boat", "boats"), ("neighbour", "neighbours"), ("visitor", "visitors"), ("player", "players"),
    ("worker", "workers"), ("writer", "writers"), ("scientist", "scientists"), ("manager", "managers"), ("lake", "lakes"),
)  # fmt: skip
LINKS = ("near", "behind", "beside", "in front of", "next to", "across from", "above")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("is", "are"), ("does", "do"))

PLURALS = (
    ("child", "children"), ("man", "men"), ("woman", "women"), ("foot", "feet"), ("tooth", "teeth"), ("mouse", "mice"),
    ("person", "people"), ("leaf", "leaves"), ("knife", "knives"), ("wife", "wives"), ("life", "lives"),
    ("wolf", "wolves"), ("city", "cities"), ("story", "stories"), ("baby", "babies"), ("country", "countries"),
    ("box", "boxes"), ("bus", "buses"), ("church", "churches"), ("hero", "heroes"), ("potato", "potatoes"),
    ("tomato", "tomatoes"), ("fly", "flies"), ("lady", "ladies"), ("party", "parties"), ("family", "families"),
    ("match", "matches"), ("watch", "watches"), ("dish", "dishes"), ("glass", "glasses"), ("class", "classes"),
    ("bacterium", "bacteria"), ("crisis", "crises"), ("cat", "cats"), ("dog", "dogs"), ("tree", "trees"),
    ("house", "houses"), ("bird", "birds"), ("ship", "ships"), ("star", "stars"), ("thief", "thieves"),
    ("half", "halves"), ("shelf", "shelves"), ("goose", "geese"), ("gentleman", "gentlemen"), ("brush", "brushes"),
)  # fmt: skip
PASTS = (
    ("go", "went", "gone"), ("see", "saw", "seen"), ("eat", "ate", "eaten"), ("come", "came", "coming"),
    ("take", "took", "taken"), ("give", "gave", "given"), ("write", "wrote", "written"), ("drive", "drove", "driven"),
    ("speak", "spoke", "spoken"), ("break", "broke", "broken"), ("choose", "chose", "chosen"),
    ("know", "knew", "known"), ("grow", "grew", "grown"), ("fly", "flew", "flown"), ("draw", "drew", "drawn"),
    ("throw", "threw", "thrown"), ("begin", "began", "begun"), ("drink", "drank", "drunk"), ("sing", "sang", "sung"),
    ("swim", "swam", "swum"), ("run", "ran", "running"), ("sit", "sat", "sitting"), ("win", "won", "winning"),
    ("buy", "bought", "buying"), ("bring", "brought", "bringing"), ("think", "thought", "thinking"),
    ("teach", "taught", "teaching"), ("catch", "caught", "catching"), ("fight", "fought", "fighting"),
    ("sell", "sold", "selling"), ("tell", "told", "telling"), ("feel", "felt", "feeling"),
    ("keep", "kept", "keeping"), ("sleep", "slept", "sleeping"), ("leave", "left", "leaving"),
    ("lose", "lost", "losing"), ("send", "sent", "sending"), ("spend", "spent", "spending"),
    ("build", "built", "building"), ("make", "made", "making"), ("find", "found", "finding"),
    ("stand", "stood", "standing"), ("understand", "understood", "understanding"), ("hold", "held", "holding"),
    ("meet", "met", "meeting"), ("lead", "led", "leading"), ("pay", "paid", "paying"), ("say", "said", "saying"),
    ("hear", "heard", "hearing"), ("wear", "wore", "worn"), ("rise", "rose", "risen"), ("fall", "fell", "fallen"),
    ("forget", "forgot", "forgotten"), ("hide", "hid", "hidden"), ("ride", "rode", "ridden"),
    ("shoot", "shot", "shooting"), ("play", "played", "playing"), ("walk", "walked", "walking"),
    ("work", "worked", "working"), ("talk", "talked", "talking"), ("look", "looked", "looking"),
    ("call", "called", "calling"), ("ask", "asked", "asking"), ("help", "helped", "helping"),
    ("move", "moved", "moving"), ("live", "lived", "living"), ("try", "tried", "trying"),
    ("study", "studied", "studying"), ("carry", "carried", "carrying"), ("stop", "stopped", "stopping"),
    ("travel", "traveled", "traveling"), ("open", "opened", "opening"), ("close", "closed", "closing"),
)  # fmt: skip
DEGREES = (
    ("big", "bigger", "biggest"), ("small", "smaller", "smallest"), ("old", "older", "oldest"),
    ("young", "younger", "youngest"), ("fast", "faster", "fastest"), ("slow", "slower", "slowest"),
    ("strong", "stronger", "strongest"), ("weak", "weaker", "weakest"), ("rich", "richer", "richest"),
    ("high", "higher", "highest"), ("low", "lower", "lowest"), ("long", "longer", "longest"),
    ("short", "shorter", "shortest"), ("large", "larger", "largest"), ("great", "greater", "greatest"),
    ("good", "better", "best"), ("bad", "worse", "worst"), ("cheap", "cheaper", "cheapest"),
    ("warm", "warmer", "warmest"), ("cold", "colder", "coldest"), ("easy", "easier", "easiest"),
    ("heavy", "heavier", "heaviest"), ("happy", "happier", "happiest"), ("deep", "deeper", "deepest"),
    ("bright", "brighter", "brightest"), ("dark", "darker", "darkest"), ("early", "earlier", "earliest"),
    ("late", "later", "latest"), ("simple", "simpler", "simplest"), ("close", "closer", "closest"),
)  # fmt: skip

CATEGORIES: dict[str, tuple[str, ...]] = {
    "bird": ("sparrow", "robin", "eagle", "owl", "pigeon", "crow", "swan", "parrot", "penguin", "hawk", "gull", "stork"),
    "fish": ("trout", "salmon", "tuna", "cod", "carp", "herring", "pike", "eel", "sardine", "shark"),
    "insect": ("beetle", "mosquito", "wasp", "butterfly", "grasshopper", "moth", "cricket", "ladybug", "termite"),
    "tree": ("oak", "pine", "maple", "birch", "willow", "cedar", "poplar", "spruce", "elm"),
    "fruit": ("pear", "peach", "mango", "plum", "cherry", "banana", "grape", "orange", "lemon", "melon", "fig"),
    "vegetable": ("carrot", "cabbage", "turnip", "cucumber", "leek", "radish", "cauliflower", "beet"),
    "flower": ("rose", "tulip", "daisy", "lily", "orchid", "daffodil", "violet", "marigold"),
    "vehicle": ("truck", "van", "tractor", "bus", "motorcycle", "tram", "taxi", "bulldozer"),
    "furniture": ("sofa", "wardrobe", "bookcase", "desk", "armchair", "dresser", "stool", "cupboard"),
    "tool": ("hammer", "screwdriver", "saw", "wrench", "drill", "chisel", "shovel", "spade", "axe"),
    "weapon": ("sword", "spear", "rifle", "dagger", "cannon", "pistol", "musket", "crossbow"),
    "instrument": ("violin", "trumpet", "flute", "cello", "guitar", "clarinet", "harp", "drum", "banjo"),
    "dance": ("waltz", "tango", "polka", "salsa", "foxtrot", "rumba", "minuet", "samba"),
    "clothing": ("shirt", "jacket", "sweater", "skirt", "coat", "blouse", "cardigan", "dress", "vest"),
    "hat": ("beret", "bonnet", "turban", "sombrero", "fedora", "bowler"),
    "boat": ("canoe", "kayak", "yacht", "ferry", "raft", "dinghy", "gondola", "trawler"),
    "disease": ("measles", "malaria", "flu", "cancer", "pneumonia", "cholera", "tuberculosis", "diabetes"),
    "metal": ("copper", "bronze", "iron", "tin", "nickel", "zinc", "brass", "silver"),
    "building": ("castle", "cottage", "palace", "church", "barn", "skyscraper", "hospital", "warehouse"),
    "dog": ("poodle", "beagle", "bulldog", "greyhound", "terrier", "spaniel", "collie"),
}  # fmt: skip

UNCOUNTABLE = frozenset({"disease", "metal"})

SERIES: tuple[tuple[str, ...], ...] = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
     "December"),
    NUMBERS[1:],
    tuple(reversed(NUMBERS)),
    ("two", "four", "six", "eight", "ten", "twelve"),
    ("one", "three", "five", "seven", "nine", "eleven"),
    ("ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
    ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ("I", "II", "III", "IV", "V", "VI", "VII", "VIII"),
    ("Sunday", "Saturday", "Friday", "Thursday", "Wednesday", "Tuesday", "Monday"),
    ("spring", "summer", "autumn", "winter"),
    ("seconds", "minutes", "hours", "days", "weeks", "months", "years"),
    ("child", "teenager", "adult"),
    tuple("ZYXWVUTSRQPO"),
    ("A", "C", "E", "G", "I", "K", "M"),
    ("December", "November", "October", "September", "August", "July", "June"),
)  # fmt: skip

PEOPLE = (
    ("my grandmother", False), ("my grandfather", True), ("his aunt", False), ("her uncle", True), ("the queen", False),
    ("the king", True), ("my sister", False), ("my brother", True), ("the princess", False), ("the prince", True),
    ("their mother", False), ("their father", True), ("the waitress", False), ("the waiter", True),
    ("the actress", False), ("the salesman", True), ("Mary", False), ("John", True), ("Elizabeth", False),
    ("Robert", True), ("Susan", False), ("David", True), ("Anna", False), ("Michael", True), ("Sarah", False),
    ("Peter", True), ("the bride", False), ("the groom", True), ("the nun", False), ("the monk", True),
    ("the widow", False), ("the policeman", True), ("my niece", False), ("my nephew", True), ("the duchess", False),
    ("the duke", True), ("Emily", False), ("Thomas", True), ("the landlady", False), ("the landlord", True),
)  # fmt: skip
PRONOUN_TEMPLATES = (
    ("{person} was late because", "he", "she"), ("{person} opened the door and took off", "his", "her"),
    ("{person} was tired, so", "he", "she"), ("when {person} came home, we all ran to greet", "him", "her"),
    ("{person} looked in the mirror and smiled at", "himself", "herself"), ("{person} has forgotten", "his", "her"),
    ("everybody likes {person}, and we miss", "him", "her"), ("{person} made dinner for friends, then washed the dishes", "himself", "herself"),
)  # fmt: skip
