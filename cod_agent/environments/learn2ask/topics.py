"""What patients and doctors of the data set say: complaints, topics, questions, answers. Written for this project.

Topics stand in pairs: two that are akin follow each other. Questions and answers fit whatever the complaint is, so that any topic may
come up with any. `named` finds topics in a question by words; that is crude, and all a judge without a model has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

COMPLAINTS: Mapping[str, tuple[str, ...]] = {
    "cough": ("I cough a lot, and it hurts in my chest.", "Hello, I have this cough and cannot get rid of it."),
    "rash": ("There is a rash on my arm, red and itchy.", "My skin is full of red spots."),
    "headache": ("I have a headache, doctor.", "My head aches, mostly behind the eyes."),
    "stomach": ("My stomach aches.", "I feel sick to my stomach and do not know what to do."),
    "back": ("My lower back hurts.", "Good day, my back is so stiff that I can hardly bend."),
    "throat": ("I have a sore throat.", "Swallowing hurts, my throat is all red."),
    "dizzy": ("I feel dizzy.", "When I stand up, everything turns."),
    "ear": ("My ear hurts.", "There is a noise in my left ear, and it aches."),
}
"""What a patient comes with: its name and ways to say it."""

ASIDES = (
    "Can you help me?",
    "I am a little worried.",
    "Please be quick, I am at work.",
    "I hope it is nothing bad.",
    "I have never done this online before.",
)
"""What a patient may say besides."""


@dataclass(frozen=True, slots=True)
class Topic:
    """Something a doctor may want to know."""

    name: str
    exchanges: tuple[tuple[str, tuple[str, ...]], ...]
    """Questions, each with its answers."""
    words: tuple[str, ...]
    """Beginnings of words or phrases that name it in a question."""


TOPICS = (
    Topic(
        "when it began",
        (
            ("How long have you had this?", ("Since yesterday.", "For about a week.", "Two or three days, I think.")),
            ("When did this begin?", ("Last Monday.", "It began last month.", "This morning, when I got up.")),
        ),
        ("how long", "since when", "when did", "when it began", "begin", "began", "start", "onset", "how many days"),
    ),
    Topic(
        "how it has changed since",
        (
            ("Is it getting better, getting worse, or is it as it was?", ("Worse.", "A little better.", "As it was.")),
            ("Does it come and go, or is it always there?", ("It comes and goes.", "It never really stops.")),
        ),
        ("better", "worse", "come and go", "comes and goes", "changed", "progress", "constant", "how has it developed"),
    ),
    Topic(
        "fever",
        (
            ("Have you measured your temperature?", ("38.2 this morning.", "37.4.", "I have no thermometer here.")),
            ("Do you have a fever: none, a slight one, or a high one?", ("None.", "A slight one.", "High, I think.")),
        ),
        ("fever", "temperature", "thermometer", "chills"),
    ),
    Topic(
        "how bad it is",
        (
            ("How bad is it, from 1 to 10?", ("Maybe a 4.", "An 8.", "Five or six, it depends.")),
            ("Is it mild, moderate, or severe?", ("Mild. I can bear it.", "Quite severe.", "Moderate, I would say.")),
        ),
        ("how bad", "how strong", "severe", "severity", "mild", "from 1 to 10", "scale of", "intense", "intensity"),
    ),
    Topic(
        "medicines taken",
        (
            ("Are you taking any medicine?", ("Paracetamol, twice a day.", "No.", "My usual pills, that is all.")),
            ("Have you taken anything for it so far?", ("Some drops from the pharmacy.", "Nothing yet.", "Just tea.")),
        ),
        ("medicine", "medication", "drugs", "pills", "tablets", "taken anything", "painkiller", "antibiotic"),
    ),
    Topic(
        "allergies",
        (
            ("Are you allergic to anything?", ("To penicillin.", "Not that I know of.", "To nuts.")),
            ("Do you have any allergies: to drugs, to food, to something else?", ("Only hay fever.", "None.")),
        ),
        (
            "allerg",
            "allergic to any medicine",
            "allergic to any medication",
            "allergic to any drugs",
            "allergies to medicine",
            "allergies to medication",
            "allergies to drugs",
            "allergies: to drugs",
            "hay fever",
            "drug allerg",
        ),
    ),
    Topic(
        "lasting illnesses",
        (
            ("Do you have any chronic illness?", ("High blood pressure.", "No, I am healthy otherwise.", "Asthma.")),
            (
                "Is there a lasting illness, such as diabetes or high blood pressure?",
                ("Diabetes, yes.", "No, neither."),
            ),
        ),
        ("chronic", "lasting illness", "diabetes", "blood pressure", "asthma", "underlying"),
    ),
    Topic(
        "operations and earlier episodes",
        (
            ("Have you ever had an operation?", ("Never.", "My appendix was taken out.", "On my knee, years ago.")),
            ("Has this happened to you before?", ("Yes, the same thing two years ago.", "No, it is the first time.")),
        ),
        ("operation", "surger", "operated", "happened to you before", "had this before", "earlier episode"),
    ),
    Topic(
        "contact with ill people",
        (
            ("Is anybody around you ill?", ("My son was, last week.", "Nobody that I know.", "Half of my office.")),
            ("Have you been in contact with someone who is sick?", ("Not that I know.", "Yes, a colleague.")),
        ),
        ("contact with", "around you ill", "around you sick", "anybody ill", "anyone sick", "someone who is sick"),
    ),
    Topic(
        "travel",
        (
            ("Have you travelled lately?", ("I came back from Spain on Sunday.", "No.", "Only to my sister's.")),
            ("Have you been abroad in the last weeks?", ("No, I was at home.", "Yes, by plane.")),
        ),
        ("travel", "abroad", "trip", "journey", "another country"),
    ),
    Topic(
        "smoking and drinking",
        (
            ("Do you smoke or drink?", ("Ten cigarettes a day.", "Neither.", "A glass of wine now and then.")),
            ("Do you smoke: never, sometimes, or daily?", ("Never.", "Sometimes.", "I gave it up last year.")),
        ),
        ("smoke", "smoking", "drink", "alcohol", "cigarette", "tobacco"),
    ),
    Topic(
        "sleep and appetite",
        (
            ("How do you sleep, and how is your appetite?", ("Both are fine.", "I hardly eat.", "I wake up a lot.")),
            ("Do you sleep well?", ("No, I lie awake.", "Like a stone.", "More than usual.")),
        ),
        ("sleep", "appetite", "eating", "wake up"),
    ),
    Topic(
        "illnesses in the family",
        (
            ("Does an illness run in your family?", ("My father had a weak heart.", "Nothing special.")),
            ("Do your parents or siblings have anything like it?", ("My mother has the same.", "Not that I know.")),
        ),
        ("family", "parents", "siblings", "relatives", "hereditary"),
    ),
    Topic(
        "work and strain",
        (
            ("What is your work like: at a desk, on your feet, or heavy?", ("I sit all day.", "I carry boxes.")),
            ("Have you been under strain: at work, at home, or not at all?", ("A lot, at work.", "Not at all.")),
        ),
        ("your work", "your job", "at work", "strain", "stress", "occupation", "heavy lifting"),
    ),
)
"""In pairs that are akin: the first and the second, the third and the fourth, ..."""


def akin(topic: int) -> int:
    """The other topic of its pair."""
    return topic ^ 1


_OF_WORD = {word: number for number, topic in enumerate(TOPICS) for word in topic.words}
_WORDS = re.compile("|".join(rf"\b{re.escape(word)}" for word in sorted(_OF_WORD, key=len, reverse=True)))


def named(text: str) -> frozenset[int]:
    """The topics that `text` names by words. The longest phrase counts: allergies to drugs are no drugs."""
    return frozenset(_OF_WORD[word] for word in _WORDS.findall(text.lower()))
