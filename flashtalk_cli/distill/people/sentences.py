"""Things to say: a grammar of our own in several languages, without end and without a source.

Sense does not matter, variety of sounds does: every language draws from words that together use
all of its phonemes. Sentences whose seed is at or beyond `HELD_OUT_FROM` come from patterns and
words that training never uses.
"""

from __future__ import annotations

import re

import numpy as np

from flashtalk_cli.distill.people.spec import HELD_OUT_FROM

ENGLISH = {
    "who": "the baker|my father|a young woman|her brother|the whole team|our neighbour|the old captain|Mary|Peter|everyone|nobody|the quiet boy|a famous painter|the doctor|this machine|the music teacher|a tall stranger|their mother|the village|some people",
    "does": "bought|wants|would never sell|has finally found|was watching|might break|loves|forgot|will paint|keeps moving|is fixing|asked about|pushed|threw away|measured|remembers|cannot open|is waiting for|brought back|wrote about",
    "what": "a pair of blue shoes|the heavy wooden box|seven small boats|that beautiful garden|the last piece of bread|a much better plan|the voice of the river|two cups of coffee|a pile of paper|the fresh fish|an empty bottle|my favourite book|the purple umbrella|a warm bath|the longest bridge|fifty photographs|the morning news|a very good question|the broken window|five yellow leaves",
    "where": "in the middle of the town|near the beach|behind the church|on the way home|under the big tree|at the office|by the open door|over the mountains|in the kitchen|far away from here|beside the old mill|up on the roof",
    "when": "before breakfast|every Thursday|after the storm|at half past five|in the evening|last winter|from time to time|as usual|in about three months|almost immediately|this afternoon|when nobody was looking",
    "say": "I think|you know|well|of course|maybe|believe me|to be honest|as far as I can tell|no|yes|oh|look|by the way|in my opinion|what a surprise",
    "ask": "how much do you know about|why would anybody move|where did you put|who is going to choose|when should we visit|have you ever heard of|could you please pass me|what happened to",
}
HELD_OUT_ENGLISH = {
    "who": "the bus driver|my youngest daughter|a friendly giant|the mayor|both of them|Robert|an honest lawyer",
    "does": "borrowed|would rather keep|is about to publish|has been mapping|smelled|imagined|gave up",
    "what": "a bowl of cherry soup|the fourth chapter|a puppy and a white mouse|the thick velvet curtain|every single moment|a job with a future|the measure of the storm",
    "where": "above the harbour|in front of the theatre|between two hills|off the coast",
    "when": "on Wednesday morning|without a word|by the end of the week|forever",
    "say": "frankly|my goodness|I must admit|on the other hand|thank you",
    "ask": "would you mind showing us|whose idea was|how did they manage to move",
}
PATTERNS = (
    "{who} {does} {what}.",
    "{who} {does} {what} {where}.",
    "{say}, {who} {does} {what} {when}.",
    "{when}, {who} {does} {what}.",
    "{ask} {what}?",
    "{who} {does} {what}, and {who} {does} {what}.",
    "{say}, {say}. {who} {does} {what}, but not {where}.",
    "{ask} {what} {where}?",
    "{say}!",
)
OTHERS = {  # language of espeak-ng (and of a festival voice, if it has one) -> words to be strung together
    "de": "der kleine Fuchs|springt über|die grüne Brücke|heute Morgen|vielleicht|ich möchte|einen Apfel und ein Buch|wir fahren nach Hause|schöne Häuser|fünf Bäume|bitte|das Wetter|war gestern furchtbar|meine Schwester|kauft neue Schuhe|warum nicht|jeden Abend|auf dem Tisch",
    "fr": "le petit garçon|mange une pomme|dans le jardin|aujourd'hui|je voudrais|un bon vin blanc|nous partons demain|peut-être|la lune est belle|chez ma grand-mère|beaucoup de monde|il pleut encore|une voiture bleue|à bientôt|où est la gare|vous parlez trop vite|deux heures et demie",
    "es": "la casa blanca|mañana por la tarde|quiero comprar|un vaso de agua|mi hermano pequeño|vive cerca del mar|muchas gracias|no me digas|el perro corre|por favor|siempre llueve aquí|buenos días|una mujer valiente|bebemos juntos|cuatro libros viejos|qué hora es",
    "it": "la bella vita|domani mattina|vorrei un caffè|mio fratello|abita a Roma|buongiorno a tutti|piove sempre|il gatto dorme|sopra il tavolo|una macchina rossa|grazie mille|perché no|bevo un bicchiere d'acqua|quattro amici|molto piacere",
    "pt": "a menina bonita|amanhã de manhã|eu queria|um copo de água|meu irmão|mora perto do mar|muito obrigado|chove bastante|bom dia|o pão está quente|sobre a mesa|boa viagem|quatro livros|vamos embora",
    "pl": "mały chłopiec|pije wodę|jutro rano|bardzo proszę|dzień dobry|moja siostra|kupuje książkę|w ogrodzie|być może|piękny widok|pada deszcz|dwa białe psy|nie wiem dlaczego|jedziemy do domu",
    "ru": "маленький мальчик|пьёт воду|завтра утром|большое спасибо|добрый день|моя сестра|покупает книгу|в саду|может быть|идёт дождь|две белые собаки|я не знаю почему|мы едем домой|хорошая погода",
    "tr": "küçük çocuk|su içiyor|yarın sabah|çok teşekkürler|merhaba|kız kardeşim|kitap alıyor|bahçede|belki|güzel bir gün|iki beyaz köpek|bilmiyorum|eve gidiyoruz|hava bugün çok soğuk",
    "sv": "den lilla pojken|dricker vatten|i morgon bitti|tack så mycket|god dag|min syster|köper en bok|i trädgården|kanske det|vackert väder|två vita hundar|jag vet inte varför|vi åker hem",
    "hi": "छोटा लड़का|पानी पीता है|कल सुबह|बहुत धन्यवाद|नमस्ते|मेरी बहन|किताब खरीदती है|बगीचे में|शायद|मौसम अच्छा है|मुझे नहीं पता|हम घर जा रहे हैं",
    "ja": "こんにちは|ぼくは みずを のみます|あした いきましょう|ありがとう ございます|いもうとは ほんを かいました|とても きれいな はな|なぜですか|おはよう",
    "cs": "malý chlapec|pije čistou vodu|zítra brzy ráno|moje babička|peče bábovku|pod velkým stromem|velmi pěkný obraz|dobrý večer|možná přijdeme později|maminka kupuje ovoce|žlutá fialka|v mlze na břehu řeky|dvě bílé ovce|buď zdráv|pověz mi příběh|fouká vítr od moře|pět párů bot|máme hlad",
    "fi": "pieni poika|juo vettä|huomenna aamulla|kiitos paljon|hyvää päivää|minun äitini|pappa ja mummo|kampaa pitkää tukkaa|leipä on pöydällä|ehkä huomenna sataa|vanha harmaa lampaamme|filmi alkaa kohta|bussi pysähtyy|vihreä omena|söpö pupu hyppii|emme tiedä miksi|yö on lämmin|viisi valkoista venettä",
    "ca": "el meu germà petit|beu un got d'aigua|demà al matí|moltes gràcies|bon dia a tothom|la meva àvia|compra pomes i peres|damunt la taula|potser plourà|fa bon temps|un home valent|fem una foto|vuit vaixells blaus|la pluja cau a poc a poc|no sé per què|quina hora és|anem cap a casa|pa amb tomàquet",
    "mr": "माझा लहान भाऊ|पाणी पितो|उद्या सकाळी|खूप आभार|नमस्कार बाबा|माझी आई|पुस्तक वाचते|बागेत फुले आहेत|आंबा गोड आहे|पाऊस पडतो|मामा बाजारात गेला|वारा वाहतो|दोन पांढरे बैल|मला माहीत नाही|आम्ही घरी जातो|भाजी फार महाग आहे|पाच मुले",
    "te": "మా అమ్మ|పాలు తెచ్చింది|రేపు ఉదయం|చాలా ధన్యవాదాలు|బావ వచ్చాడు|పాప బొమ్మ కావాలి|మామిడి పండు|వాన పడుతోంది|బాబు పాట పాడాడు|మేము ఊరికి వెళ్తాము|పువ్వులు బాగున్నాయి|నమస్కారం|రెండు తెల్ల ఆవులు|నాకు తెలియదు|భోజనం చేద్దాం|గాలి వీస్తోంది|ఐదు పుస్తకాలు",
}
LANGUAGES = ("en", *OTHERS)
# What held-out voices speak: fixed, so that languages added later leave the held-out bank as it is.
HELD_OUT_LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "pl", "ru", "tr", "sv", "hi", "ja")
HELD_OUT_WORDS = 3  # the last words of each other language are kept from training
# Whoever knows few words learns those by heart: in training most sentences are of words that nobody has heard.
INVENTED_SHARE = 0.75


def _english(rng: np.random.Generator, words: dict[str, str]) -> str:
    pattern = str(rng.choice(PATTERNS))
    while "{" in pattern:
        start, end = pattern.index("{"), pattern.index("}")
        choice = str(rng.choice(words[pattern[start + 1 : end]].split("|")))
        pattern = pattern[:start] + choice + pattern[end + 1 :]
    return pattern[0].upper() + pattern[1:]


def _invented(rng: np.random.Generator, language: str) -> str:
    """Words that the language does not have: each the beginning of one that it has, and the end of another."""
    phrases = "|".join(ENGLISH.values() if language == "en" else _others(language, held_out=False))
    known = re.findall(r"[^\s|,.?!']+", phrases)

    def word() -> str:
        begins, ends = (str(one) for one in rng.choice(known, 2))
        return begins[: rng.integers(1, len(begins) + 1)] + ends[rng.integers(len(ends)) :]

    words = [word() + ("," if rng.random() < 0.12 else "") for _ in range(int(rng.integers(3, 10)))]
    return " ".join(words).strip(",").capitalize() + str(rng.choice((".", ".", "?")))


def _others(language: str, *, held_out: bool) -> list[str]:
    words = OTHERS[language].split("|")
    return words[-HELD_OUT_WORDS:] if held_out else words[:-HELD_OUT_WORDS]


def draw_sentence(seed: int, language: str = "en") -> str:
    """The sentence of that seed in a language of `LANGUAGES`; most of those for training mean nothing."""
    rng = np.random.default_rng((5, seed))
    held_out = seed >= HELD_OUT_FROM
    if not held_out and rng.random() < INVENTED_SHARE:
        return _invented(rng, language)
    if language == "en":
        return _english(rng, HELD_OUT_ENGLISH if held_out else ENGLISH)
    chosen = rng.choice(_others(language, held_out=held_out), size=int(rng.integers(2, 6)))
    commas = (", " if rng.random() < 0.25 else " " for _ in chosen)
    return "".join(word + comma for word, comma in zip(chosen, commas, strict=True)).strip(" ,") + "."
