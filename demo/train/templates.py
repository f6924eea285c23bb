"""Ways to state, change and ask for a fact, and to ask for a list.

What it is for: the sentence patterns of the recall and repeat skills.  {k} is
the thing ("code"), {v} its value; "(a|b|)" is expanded at random by data.py.

What it is not for: values (words.py) and fixed answers (knowledge.py).
"""

# Facts of the form "my/the {k} is {v}". {D} is the owner as the user says it
# ("my", "the", "Tom's"), {A} as the assistant says it ("your", "the", "Tom's").
TELL = """{D} {k} is {v}|{D} {k} is {v}|{D} {k} is {v}|{D} {k} is {v}|remember that {D} {k} is {v}|please remember that {D} {k} is {v}
remember: {D} {k} is {v}|please remember: {D} {k} is {v}|{v} is {D} {k}|note that {D} {k} is {v}|{D} {k} is {v}, please remember (it|that)
(I want you to know|you should know|just so you know,|for later:|keep in mind that|don't forget that|do not forget:) {D} {k} is {v}
remember {D} {k}: {v}|{D} {k}: {v}|(hi|hello|hey), {D} {k} is {v}|can you remember that {D} {k} is {v}|by the way, {D} {k} is {v}|also, {D} {k} is {v}
{D} {k} is {v}. (can you remember it|remember it|please remember that|keep it in mind)|I have something to tell you: {D} {k} is {v}
let me tell you {D} {k}: it is {v}|{D} {k} = {v}|save this: {D} {k} is {v}|the next fact is that {D} {k} is {v}|one more thing: {D} {k} is {v}
{D} {k} is {v}, (don't forget it|do not forget|ok|okay|please keep that in mind|got it|remember that|please remember)|so {D} {k} is {v}|well, {D} {k} is {v}
for your information, {D} {k} is {v}|I have chosen {D} {k}: {v}|{D} {k} will be {v}|{D} {k} was set to {v}|make a note: {D} {k} is {v}|store {D} {k}: {v}""".replace("\n", "|;|")
TELL_ACK = ["Okay, I will remember that {A} {k} is {v}."]
ASK = """what is {D} {k}|what is {D} {k}|what is {D} {k}|what's {D} {k}|do you remember {D} {k}|tell me {D} {k}|can you tell me {D} {k}|what was {D} {k}
what did I say {D} {k} (was|is)|please tell me {D} {k} again|{D} {k}|and {D} {k}|and what is {D} {k}|do you know {D} {k}|I forgot {D} {k}
remind me of {D} {k}|could you remind me what {D} {k} is|say {D} {k}|what is {D} {k} again|do you (still )?(know|remember) what {D} {k} is|so what is {D} {k}
which {k} did I (tell|give) you|now tell me {D} {k}|(hi|hello|hey|ok|thanks), what is {D} {k}|please say what {D} {k} is|earlier I told you {D} {k}. what is it
I told you {D} {k}. what was it|what is {D} {k} now|can you recall {D} {k}|give me {D} {k}|repeat {D} {k}
(can|could) you tell me what {D} {k} is|do you know what {D} {k} is|please tell me what {D} {k} is|I forgot what {D} {k} is|tell me what {D} {k} is|what did I say about {D} {k}
I need {D} {k}|what exactly is {D} {k}|let me know {D} {k}|quick question: what is {D} {k}|I can't remember {D} {k}|what's {D} {k} again|do you have {D} {k}|what {k} did I (tell|give) you""".replace("\n", "|;|")
ANSWER = "{A} {k} is {v}."
MISSING = "You have not told me {A} {k} yet."
UPDATE = """actually, {D} {k} is {v}|actually, {D} {k} is {v} now|{D} {k} is now {v}|{D} {k} (has )?changed to {v}|correction: {D} {k} is {v}
I changed {D} {k} to {v}|no, {D} {k} is {v}|update: {D} {k} is {v}|{D} new {k} is {v}|please change {D} {k} to {v}|sorry, I meant {D} {k} is {v}|wait, {D} {k} is {v}
(oh|oops), {D} {k} is {v}|forget the old {k}, it is {v} now|{D} {k} is not that any more, it is {v}|from now on {D} {k} is {v}|{D} {k} is {v} now""".replace("\n", "|;|")
UPDATE_ACK = ["Okay, {A} {k} is now {v}."]


def split(text: str) -> list[str]:
    """Patterns of one block; ';' only marks former line ends."""
    out, depth, cur = [], 0, ""
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "|" and depth == 0:
            out.append(cur)
            cur = ""
        else:
            cur += c
    return [s.strip() for s in out + [cur] if s.strip() and s.strip() != ";"]


TELL, ASK, UPDATE = split(TELL), split(ASK), split(UPDATE)

# Facts with their own wording: tell, ask, answer, missing, update, acknowledgement.
SPECIAL = {
    "name": dict(
        kind="name",
        tell="my name is {v}|my name is {v}|my name is {v}|I am {v}|I'm {v}|call me {v}|you can call me {v}|(hi|hello|hey), I am {v}|(hi|hello|hey), I'm {v}|(hi|hello|hey), my name is {v}|{v} is my name|this is {v}|please call me {v}|remember that my name is {v}|my name's {v}|people call me {v}|I am called {v}|hello! my name is {v}|hi! I'm {v}|hi there, my name is {v}|my name is {v}, nice to meet you|my name is {v}. nice to meet you|(hi|hello|hey) baton, I am {v}|(hi|hello|hey) baton, my name is {v}|so my name is {v}|my first name is {v}|good morning, I am {v}|I go by {v}|they call me {v}|name: {v}",
        ask="what is my name|what's my name|who am I|do you remember my name|do you know my name|tell me my name|what was my name|can you tell me my name|what am I called|say my name|my name|and my name|what is my name again|do you know who I am|I forgot my name|do you still know my name|what name did I (give|tell) you|remind me of my name|can you tell me what my name is|do you know what my name is|please tell me my name|could you say my name|tell me who I am|what is my first name|what do people call me|and who am I|do you recall my name",
        answer="Your name is {v}.", missing="You have not told me your name yet.",
        update="actually, my name is {v}|no, my name is {v}|sorry, my name is {v}|call me {v} from now on|I changed my name to {v}|my name is now {v}|correction: my name is {v}",
        ack=["Nice to meet you, {v}."], upack=["Okay, your name is now {v}."]),
    "city": dict(
        kind="city",
        tell="I live in {v}|I live in {v}|my city is {v}|my home is in {v}|I am living in {v}|(remember that|note that|by the way,) I live in {v}|my home town is {v}|{v} is my city|my home city is {v}|I have a flat in {v}",
        ask="where do I live|which city do I live in|what city do I live in|what is my city|do you know where I live|where is my home|in which city do I live|do you remember where I live|what's my city|tell me where I live|what is my home town|where did I say I live|can you tell me where I live|please tell me where I live|what town do I live in|do you remember my city|where is it that I live|and where do I live",
        answer="You live in {v}.", missing="You have not told me where you live yet.",
        update="I moved to {v}|actually, I live in {v}|I live in {v} now|I now live in {v}|my city is now {v}|we moved to {v}|no, I live in {v}",
        ack=["Okay, I will remember that you live in {v}."], upack=["Okay, you now live in {v}."]),
    "job": dict(
        kind="job",
        tell="I work as {v}|I am {v}|my job is {v}|I'm {v}|I am working as {v}|(remember that|by the way,) I am {v}|by profession I am {v}",
        ask="what is my job|what do I do|what do I work as|what's my job|do you remember my job|what do I do for a living|what is my profession|what kind of work do I do|tell me my job",
        answer="You work as {v}.", missing="You have not told me your job yet.",
        update="I now work as {v}|I changed jobs, I work as {v} now|my new job is {v}|actually, I work as {v}",
        ack=["Okay, I will remember that you work as {v}."], upack=["Okay, you now work as {v}."]),
    "age": dict(
        kind="age",
        tell="I am {v} years old|my age is {v}|I am {v}|I'm {v} years old|I am aged {v}",
        ask="how old am I|what is my age|do you know how old I am|what's my age|tell me my age|do you remember how old I am",
        answer="You are {v} years old.", missing="You have not told me your age yet.",
        update="actually, I am {v} years old|I just turned {v}|I am {v} now|sorry, I am {v}",
        ack=["Okay, I will remember that you are {v} years old."], upack=["Okay, you are now {v} years old."]),
    "origin": dict(
        kind="country",
        tell="I am from {v}|I come from {v}|I'm from {v}|my home country is {v}|I was born in {v}|my country is {v}",
        ask="where am I from|where do I come from|which country am I from|what is my home country|what country do I come from|what is my country",
        answer="You are from {v}.", missing="You have not told me where you are from yet.",
        update="actually, I am from {v}|sorry, I am from {v}|no, I come from {v}",
        ack=["Okay, I will remember that you are from {v}."], upack=["Okay, you are from {v}."]),
    "like": dict(
        kind="like",
        tell="I like {v}|I love {v}|I really like {v}|I enjoy {v}|I like {v} a lot|I like {v} (very much|the most)|remember that I like {v}",
        ask="what do I like|do you know what I like|what do I love|what did I say I like|tell me what I like|what do I enjoy",
        answer="You like {v}.", missing="You have not told me what you like yet.",
        update="I now like {v} instead|actually, I like {v} more|no, I like {v}",
        ack=["Okay, I will remember that you like {v}."], upack=["Okay, you now like {v}."]),
    "called": dict(  # pets and people; {k} is the relation
        kind="given",
        tell="my {k} is called {v}|my {k}'s name is {v}|my {k} is named {v}|the name of my {k} is {v}|I have a {k} called {v}|I have a {k} named {v}|I have a {k}, {v}|my {k} is {v}|{v} is my {k}|remember that my {k} is called {v}|I have a {k}. (his|her|its) name is {v}",
        ask="what is my {k}'s name|what is the name of my {k}|what is my {k} called|what's my {k}'s name|do you remember my {k}'s name|who is my {k}|what was my {k}'s name|tell me my {k}'s name|how is my {k} called|and what is my {k} called|what is my {k} named|do you know the name of my {k}",
        answer="Your {k} is called {v}.", missing="You have not told me about your {k} yet.",
        update="actually, my {k} is called {v}|we renamed my {k} to {v}|sorry, my {k}'s name is {v}|no, my {k} is called {v}|my {k} is now called {v}|my {k}'s name is now {v}",
        ack=["Okay, I will remember that your {k} is called {v}."], upack=["Okay, your {k} is now called {v}."]),
    "when": dict(  # appointments; {k} is the event
        kind="clock",
        tell="my {k} is at {v}|the {k} is at {v}|my {k} starts at {v}|the {k} starts at {v}|I have a {k} at {v}|there is a {k} at {v}|remember that the {k} is at {v}|remember my {k} at {v}|we have a {k} at {v}|my {k} time is {v}|the {k} time is {v}|{k} at {v}",
        ask="when is my {k}|when is the {k}|what time is (my|the) {k}|at what time is (my|the) {k}|when does (my|the) {k} start|what is (my|the) {k} time|do you remember when (my|the) {k} is|tell me when the {k} is|when did I say (my|the) {k} is|what time does the {k} start",
        answer="Your {k} is at {v}.", missing="You have not told me when your {k} is yet.",
        update="the {k} (was|has been|is) moved to {v}|my {k} (was|has been|is) moved to {v}|actually, the {k} is at {v}|the {k} is now at {v}|change my {k} to {v}|sorry, my {k} is at {v}|the {k} time changed to {v}",
        ack=["Okay, I will remember that your {k} is at {v}."], upack=["Okay, your {k} is now at {v}."]),
}
for _s in SPECIAL.values():
    for _f in ("tell", "ask", "update"):
        _s[_f] = split(_s[_f])

RELATIONS = "dog cat friend sister brother best friend mother father boss neighbor son daughter wife husband hamster parrot rabbit horse teacher cousin uncle aunt turtle fish".replace("best friend", "best_friend").split()
RELATIONS = [r.replace("_", " ") for r in RELATIONS]
EVENTS = ["meeting", "flight", "train", "appointment", "lunch", "dinner", "class", "party", "call", "interview", "lesson", "concert", "game", "exam"]

# Keys of "my {k} is {v}" facts with the kind of value they take.
MY_KEYS = {
    "code": "digits", "pin": "digits", "pin code": "digits", "secret code": "code", "password": "secret", "secret word": "secret",
    "magic word": "secret", "code word": "secret", "lucky number": "num", "number": "digits", "room number": "num",
    "phone number": "phone", "order number": "digits", "ticket number": "code", "seat": "code", "car": "thing", "address": "address",
    "project": "project", "nickname": "given", "birthday": "date", "hobby": "hobby", "locker": "num", "door code": "digits",
    "account number": "digits", "username": "secret", "team": "thing", "school": "thing", "id": "code", "secret number": "digits",
    "zip code": "digits", "last name": "given", "height": "num", "bus": "num", "secret": "secret", "company": "thing", "email": "email", "motto": "thing", "boat": "thing", "street": "address", "phone": "phone", "pass": "code", "flight number": "code", "hotel": "thing", "size": "num",
}
FAVOURITES = {"color": "color", "colour": "color", "food": "food", "animal": "animal", "drink": "drink", "number": "num", "city": "city",
              "country": "country", "word": "secret", "sport": "hobby", "book": "thing", "movie": "thing", "song": "thing", "fruit": "word",
              "month": "month", "day": "day", "hobby": "hobby", "game": "hobby", "name": "given", "letter": "letter"}
THE_KEYS = {"code": "digits", "password": "secret", "wifi password": "secret", "secret word": "secret", "gate": "num", "platform": "num",
            "room": "num", "door code": "digits", "project": "project", "key": "code", "magic number": "num", "number": "digits", "total": "num",
            "winner": "given", "answer": "num", "deadline": "day", "capital": "city", "color": "color", "word": "secret", "price": "num", "date": "date"}

# Repeat-this requests; {l} is the list. WHAT fits the kind of the items.
REPEAT = """repeat: {l}|repeat {l}|repeat: {l}|repeat {l}|please repeat: {l}|please repeat {l}|repeat after me: {l}|repeat after me {l}|repeat (these|the|the following|those|my) {W}: {l}
please repeat (these|the|the following|those|my) {W}: {l}|say {l}|say: {l}|echo {l}|echo: {l}|can you repeat {l}|can you repeat (this|these {W}): {l}|could you (please )?repeat: {l}
repeat this list: {l}|repeat the following: {l}|repeat the following list: {l}|repeat the list {l}|copy this: {l}|copy: {l}|say after me: {l}|repeat (these|the) {W} {l}|repeat back: {l}
repeat back to me: {l}|say (these|the) {W}: {l}|please say: {l}|{l}. repeat (that|them|this|it)|{l} - repeat (that|them|this) please|here are some {W}: {l}. please repeat them
now repeat: {l}|now repeat {l}|repeat this: {l}|repeat this {l}|repeat exactly: {l}|I say {l}, you repeat it|please repeat this list of {W}: {l}|list of {W}: {l}. repeat it|write: {l}
can you say {l}|would you repeat these {W} for me: {l}|repeat these for me: {l}|and now: repeat {l}|try to repeat {l}|please echo: {l}|repeat in the same order: {l}""".replace("\n", "|;|")
REPEAT_ANSWER = "Here you go: {l}"
LIST_TELL = """remember this list: {l}|remember the list: {l}|remember these {W}: {l}|please remember these {W}: {l}|remember {l}|here is a list: {l}
my {L} is: {l}|my {L} is {l}|my {L}: {l}|this is my {L}: {l}|here is my {L}: {l}|please remember my {L}: {l}|remember my {L}: {l}|I need to buy {l}|the list is: {l}|the list is {l}|keep this list in mind: {l}|memorize this list: {l}|memorize these {W}: {l}""".replace("\n", "|;|")
LIST_ACK = "Okay, I will remember the list."
LIST_ASK = """what is my list|what is the list|what was the list|what was on the list|what is on my {L}|repeat the list|please repeat the list|say the list again|what is my {L}
tell me my {L}|what were the {W}|which {W} did I (give|tell) you|which {W} did I ask you to remember|repeat my {L}|what is on the list|what did I ask you to remember|can you repeat the list|recall the list
list the {W}|do you remember the list|do you remember my {L}|give me the list|tell me the {W}|now repeat the list|what's on my {L}|what do I need to buy|what was my {L}|tell me the list""".replace("\n", "|;|")
LIST_ANSWER = "The list is: {l}"
LIST_MISSING = "You have not given me a list yet."
LIST_FIRST = ["what is the first {w} (on|in|of) the list", "what was the first {w}", "what is the first {w}", "which {w} was first", "tell me the first {w}"]
LIST_LAST = [s.replace("first", "last") for s in LIST_FIRST]
AGAIN = ["again", "repeat that", "say that again", "once more", "can you repeat that", "one more time", "please say it again", "what did you say", "pardon", "say it again"]
REPEAT, LIST_TELL, LIST_ASK = split(REPEAT), split(LIST_TELL), split(LIST_ASK)
LIST_NAMES = ["list", "list", "shopping list", "to-do list", "word list", "packing list", "grocery list"]
ABOUT_ME = ["what do you know about me", "what have I told you", "what did I tell you", "tell me everything you know about me", "what do you remember about me",
            "what do you remember", "list everything I told you", "what facts do you know about me", "tell me what you know about me", "summarize what I told you"]
ABOUT_ME_MISSING = "You have not told me anything about you yet."
# A sentence to repeat; {w} are words, {v} a value.
SENTENCES = ["the {w} is {w}", "I like {w} and {w}", "my {w} is in the {w}", "a {w} and a {w} are on the {w}", "the {w} has a {w} {w}", "we have {w} {w}s", "my name is {v}",
             "the {w} jumps over the {w}", "hello {v}", "hello {w}", "I am a {w}", "there is no {w} in the {w}", "{w} is not {w}", "my code is {v}", "the old {w} was {w}",
             "she saw the {w} at the {w}", "he said {w} to the {w}", "I want a {w} for my {w}", "good morning, {v}", "where is the {w}", "{v} likes {w}", "this is a {w}"]
SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful assistant.", "You are the demo model of baton.", "Be brief.",
          "You are a helpful, honest and brief assistant.", "Answer the user.", "You are a friendly chatbot.", "You are a chat model. Keep answers short.", "You are a {w} assistant.", "Talk like a {w}.", "Answer in one sentence.", "You help the user with {w} and {w}.", "Your name is {p}."]
