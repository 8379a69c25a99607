"""Short made chats whose later turns need a fact told earlier, so that the answer can only be copied from the chat.

Each value of a fact (Anna, green, Lisbon) belongs to one split by its hash and is told in chats of that split alone:
a model that answers right on held-out chats has learnt to look back, not to recite.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from trivium.data.source import split_of
from trivium_plugins.primer.config import PrimerConfig
from trivium_plugins.primer.tasks import draw


class Topic(NamedTuple):
    """A fact about the user: how it is told, taken note of, asked for and answered, and the values it can have."""

    tell: tuple[str, ...]
    note: tuple[str, ...]
    ask: tuple[str, ...]
    answer: str
    values: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in text.replace("\n", " ").split(","))


NAMES = _list("""
    Aaron, Abigail, Adam, Agnes, Alan, Albert, Alex, Alfred, Alice, Amanda, Amber, Amy, Andrew, Angela, Anna,
    Anthony, Arthur, Audrey, Barbara, Beatrice, Ben, Bernard, Beth, Betty, Bill, Bob, Brenda, Brian, Bridget, Bruce,
    Carla, Carol, Caroline, Catherine, Cecil, Charles, Charlotte, Chris, Clara, Claire, Colin, Connie, Craig,
    Cynthia, Daisy, Daniel, David, Dawn, Deborah, Dennis, Derek, Diana, Donald, Donna, Doris, Dorothy, Douglas,
    Duncan, Edgar, Edith, Edward, Eleanor, Elizabeth, Ella, Ellen, Emily, Emma, Eric, Ernest, Esther, Ethan, Eva,
    Evelyn, Felix, Fiona, Flora, Florence, Frances, Frank, Fred, Gary, George, Gerald, Gloria, Gordon, Grace,
    Graham, Greg, Hannah, Harold, Harriet, Harry, Hazel, Heather, Helen, Henry, Herbert, Hilda, Hugh, Ian, Ida,
    Irene, Iris, Isaac, Isabel, Ivan, Ivy, Jack, Jacob, James, Jane, Janet, Jason, Jean, Jennifer, Jenny, Jeremy,
    Jessica, Jill, Joan, Joe, John, Joseph, Joyce, Judith, Julia, Julian, Karen, Kate, Keith, Kenneth, Kevin, Laura,
    Lawrence, Leo, Leonard, Lewis, Lily, Linda, Lisa, Louis, Louise, Lucas, Lucy, Luke, Margaret, Maria, Marion,
    Mark, Martha, Martin, Mary, Matthew, Maurice, Max, Michael, Mildred, Monica, Nancy, Nathan, Neil, Nicholas,
    Nigel, Nina, Nora, Norman, Oliver, Olivia, Oscar, Pamela, Patrick, Paul, Paula, Peggy, Peter, Philip, Rachel,
    Ralph, Raymond, Rebecca, Richard, Robert, Robin, Roger, Ronald, Rosa, Ruby, Ruth, Sally, Sam, Samuel, Sandra,
    Sarah, Scott, Sharon, Sheila, Simon, Sophie, Stella, Stephen, Steve, Stuart, Susan, Sylvia, Teresa, Thomas, Tim,
    Tina, Tom, Tony, Vera, Victor, Vincent, Violet, Walter, Wendy, William, Yvonne, Zoe
""")

COLOURS = _list("""
    red, blue, green, yellow, orange, purple, pink, brown, black, white, grey, violet, gold, silver, turquoise,
    crimson, scarlet, beige, amber, indigo, lilac, maroon, navy, olive, cream, bronze, copper, lavender, magenta,
    teal
""")

ANIMALS = _list("""
    ant, bat, badger, bear, beaver, bee, bird, buffalo, butterfly, camel, cat, cheetah, cow, crab, crane, crow,
    deer, dog, dolphin, donkey, dove, duck, eagle, elephant, falcon, fish, fox, frog, giraffe, goat, goose, hare,
    hawk, hedgehog, hen, heron, horse, kangaroo, kitten, koala, lamb, leopard, lion, lizard, mole, monkey, moose,
    mouse, mule, octopus, otter, owl, panda, parrot, penguin, pig, pigeon, pony, rabbit, raven, robin, salmon, seal,
    shark, sheep, snail, snake, sparrow, spider, squirrel, swan, tiger, tortoise, turkey, turtle, walrus, whale,
    wolf, zebra
""")

CITIES = _list("""
    Amsterdam, Athens, Baghdad, Bangkok, Barcelona, Beijing, Belfast, Berlin, Bombay, Boston, Bristol, Brussels,
    Budapest, Cairo, Calcutta, Cambridge, Cardiff, Chicago, Copenhagen, Cork, Dallas, Delhi, Denver, Detroit,
    Dublin, Edinburgh, Florence, Geneva, Glasgow, Hamburg, Havana, Helsinki, Houston, Istanbul, Jakarta, Kyoto,
    Leeds, Lima, Lisbon, Liverpool, London, Madrid, Manchester, Manila, Melbourne, Milan, Montreal, Moscow, Munich,
    Nairobi, Naples, Oslo, Oxford, Paris, Prague, Rome, Seattle, Seoul, Stockholm, Sydney, Tokyo, Toronto, Venice,
    Vienna, Warsaw, York, Zurich
""")

FOODS = _list("""
    apple pie, bacon, bananas, beans, beef, bread, broccoli, butter, cabbage, cake, carrots, cheese, cherries,
    chicken, chocolate, corn, crab, curry, custard, dates, eggs, figs, fish, fruit, garlic, ginger, grapes, ham,
    honey, ice cream, jam, lamb, lemons, lettuce, melon, mushrooms, noodles, nuts, oats, olives, onions, oranges,
    pancakes, pasta, peaches, pears, peas, pizza, plums, pork, porridge, potatoes, pudding, pumpkin, rice, salad,
    salmon, sausages, soup, spinach, stew, strawberries, toast, tomatoes, trout, turkey, vegetables, waffles,
    walnuts
""")

TOPICS: dict[str, Topic] = {
    "name": Topic(
        ("My name is {}.", "I am {}.", "Hello, my name is {}.", "I am called {}."),
        ("Nice to meet you, {}.", "Hello, {}."),
        ("What is my name?", "Do you remember my name?", "Who am I?"),
        "Your name is {}.",
        NAMES,
    ),
    "colour": Topic(
        ("My favourite colour is {}.", "The colour I like best is {}.", "I like {} more than any other colour."),
        ("I will remember that you like {}.", "A fine colour."),
        ("What is my favourite colour?", "Which colour do I like best?"),
        "Your favourite colour is {}.",
        COLOURS,
    ),
    "animal": Topic(
        ("My favourite animal is the {}.", "The animal I like best is the {}.", "I love the {} above all animals."),
        ("The {} is a fine animal.", "I will remember the {}."),
        ("What is my favourite animal?", "Which animal do I like best?"),
        "Your favourite animal is the {}.",
        ANIMALS,
    ),
    "city": Topic(
        ("I live in {}.", "My home is in {}.", "I come from {}.", "The city where I live is {}."),
        ("{} must be a fine place.", "I have heard of {}."),
        ("Where do I live?", "Which city is my home?", "Where is my home?"),
        "You live in {}.",
        CITIES,
    ),
    "food": Topic(
        ("My favourite food is {}.", "The food I like best is {}.", "I like to eat {}."),
        ("I will remember that you like {}.", "That sounds good."),
        ("What is my favourite food?", "What do I like to eat?"),
        "Your favourite food is {}.",
        FOODS,
    ),
    "number": Topic(
        ("My lucky number is {}.", "The number I like best is {}."),
        ("I will remember the number {}.", "A good number."),
        ("What is my lucky number?", "Which number do I like best?"),
        "Your lucky number is {}.",
        tuple(str(n) for n in range(2, 100)),
    ),
}

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Who are you?", "I am a small language model."),
    ("What are you?", "I am a small language model."),
    ("What is your name?", "I have no name. I am a small language model."),
    ("How are you?", "I am well, thank you."),
    ("Can you help me?", "Yes, I will try to help you."),
)

FAREWELLS = (
    ("Thank you!", "You are welcome."),
    ("Thanks for your help.", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("That is all for today.", "Goodbye, until next time!"),
)


@lru_cache(maxsize=64)
def values_of(topic: str, split: str) -> tuple[str, ...]:
    """The values of a topic that chats of `split` may tell; a turkey is on one side, eaten or liked."""
    return tuple(v for v in TOPICS[topic].values if split_of(f"chats/{v.lower()}", 0.1, 0.1) == split)


class _Fact:
    """A topic, a value and phrasings, all drawn by hash from `key`."""

    def __init__(self, topic: str, split: str, key: tuple[object, ...]) -> None:
        self._key, self._topic = (*key, topic), TOPICS[topic]
        self.value = _choose(values_of(topic, split), *self._key, "value")
        self.tell = self._phrase("tell")
        self.note = self._phrase("note")
        self.ask = self._phrase("ask")
        self.answer = self._topic.answer.format(self.value)

    def _phrase(self, role: str) -> str:
        return _choose(getattr(self._topic, role), *self._key, role).format(self.value)


def _choose(options: tuple[Any, ...], *key: object) -> Any:
    return options[draw(*key) % len(options)]


# Each plan takes the fact that is asked for, another fact, and two ways of passing the time: small talk and a farewell.
# It gives (user, assistant) turns. The order of the two facts varies, so that place alone does not tell the answer.
PLANS = (
    lambda a, b, talk, bye: [(a.tell, a.note)],
    lambda a, b, talk, bye: [(f"{a.tell} {a.ask}", a.answer)],
    lambda a, b, talk, bye: [(f"{a.tell} {b.tell} {a.ask}", a.answer)],
    lambda a, b, talk, bye: [(f"{b.tell} {a.tell} {a.ask}", a.answer)],
    lambda a, b, talk, bye: [(a.tell, a.note), (a.ask, a.answer)],
    lambda a, b, talk, bye: [(f"{a.tell} {b.tell}", b.note), (a.ask, a.answer)],
    lambda a, b, talk, bye: [(f"{b.tell} {a.tell}", a.note), (a.ask, a.answer)],
    lambda a, b, talk, bye: [(f"{a.tell} {b.tell}", b.note), (a.ask, a.answer), (b.ask, b.answer)],
    lambda a, b, talk, bye: [(a.tell, a.note), (b.tell, b.note), (a.ask, a.answer)],
    lambda a, b, talk, bye: [(b.tell, b.note), (a.tell, a.note), (a.ask, a.answer)],
    lambda a, b, talk, bye: [(a.tell, a.note), talk, (a.ask, a.answer)],
    lambda a, b, talk, bye: [talk, (a.tell, a.note), (a.ask, a.answer)],
    lambda a, b, talk, bye: [(a.tell, a.note), (a.ask, a.answer), bye],
    lambda a, b, talk, bye: [(f"{a.tell} {a.ask}", a.answer), bye],
)


class Chats:
    """`num_chats` chats of one to three turns, each with at least one fact."""

    def __init__(self, config: PrimerConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.num_chats

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = (self.config.seed, "chats", index)
        first = _choose(tuple(TOPICS), *key, "first")
        second = _choose(tuple(t for t in TOPICS if t != first), *key, "second")
        facts = [_Fact(topic, self.config.split, key) for topic in (first, second)]
        plan = _choose(PLANS, *key, "plan")
        turns = plan(*facts, _choose(SMALL_TALK, *key, "talk"), _choose(FAREWELLS, *key, "bye"))
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        return {"id": f"chats/{index}", "messages": messages}

    def identity(self) -> list[Any]:
        """What the content follows from, beyond the split."""
        return [self.config.seed, self.config.num_chats]
