#!/usr/bin/env python3
"""Writes the quickstart's data: an order in plain English -> one line of JSON with fixed fields.

    make_data.py [OUT_DIR]        default: data/ beside this file, where the result is shipped

    "Ms Fielding would like 12 purple baskets by 7th of March. We are at 48 Leeds Road."
    {"customer":"Ms Fielding","order":"12 purple baskets","address":"48 Leeds Road","date":"03-07"}

Customer, order and address are copied as written, the date becomes MM-DD. No value of heldout.jsonl occurs in train.jsonl (no
last name, no word of an item, no street name, no quantity or house number, no date), and a quarter of it uses phrasings that
training never shows: a right answer is not a remembered one. Same output every time.

A value starts with a title or a digit for a reason: after a quotation mark the tokenizer spells a word in other tokens than after
a blank, so that copying it would be a test of spelling, which is not what a few minutes of training are to show.
"""
import json
import random
import sys
from pathlib import Path

SEED = 20260
TRAIN_SAMPLES, HELDOUT_SAMPLES = 960, 200
SYSTEM = 'Reply with the order as JSON: customer, order, address, date (MM-DD).'

MONTHS = {
    'January': 31, 'February': 28, 'March': 31, 'April': 30, 'May': 31, 'June': 30,
    'July': 31, 'August': 31, 'September': 30, 'October': 31, 'November': 30, 'December': 31,
}

TITLES = ['Mr', 'Ms', 'Dr', 'Mrs']
WAYS = ['Road', 'Street', 'Lane', 'Avenue', 'Square']
PHRASINGS = [
    '{customer} would like {order} by {date}. The address is {address}.',
    'Please send {order} to {customer}, {address}, before {date}.',
    'New order: {order}, customer {customer}, {address}, due {date}.',
    'On {date} we ship {order} to {address} for {customer}.',
    '{customer} ordered {order}. Deliver to {address} on {date}.',
    'Hi, this is {customer}. I need {order} at {address} by {date}, thanks!',
    'Can you get {order} to {address} by {date}? Ask for {customer}.',
    'By {date}, {customer} of {address} expects {order}.',
    'Customer {customer} ({address}) wants {order} on {date}.',
    'Our shop at {address} is empty; please bring {order} on {date}. Regards, {customer}',
    '{address}, {date}: {order} for {customer}.',
    'I would like to buy {order}. Ship them to {address} by {date}. My name is {customer}.',
    'Reserve {order} for {customer}, to be left at {address} on {date}.',
    'The branch in {address} called: {customer} asked for {order}, no later than {date}.',
    'Put me down for {order} please, delivery {date}, {address}. {customer}',
    'For {customer}: {order}, to arrive at {address} on {date}.',
    'We promised {customer} {order} by {date}. Address: {address}.',
    'Need {order} at {address}. Deadline {date}. Contact {customer}.',
    'Dear team, {customer} in {address} is waiting for {order}, to be delivered {date}.',
    'Could {order} reach {address} by {date}? They are for {customer}.',
    'Note: {order} for {date}, {customer}, {address}.',
    'Pack {order} for {date}; they leave for {address}, care of {customer}.',
    'Take down this order from {customer}: {date}, {order}, {address}.',
    'The delivery to {address} on {date} is {order}; it was paid by {customer}.',
    'Order from {customer}: {order}, {date}, {address}.',
    '{date} is the day when {customer} gets {order} at {address}.',
    'A call from {address}: {order} for {customer}, please, by {date}.',
    'Schedule {date} for {order}: {customer}, {address}.',
    'At {address}, {customer} needs {order} by {date}.',
    'Plan {order} for {address} and {customer}, {date}.',
]
# Used in the held-out set only, for one item in four.
UNSEEN_PHRASINGS = [
    'Book {order} for {date}: they go to {customer} at {address}.',
    '{customer} just phoned from {address} and wants {order} by {date}.',
    'Delivery of {order} to {address} is planned for {date}; the buyer is {customer}.',
    'Write down an order by {customer}: {order}, {date}, {address}.',
]

TRAIN = {
    'last': '''Adams Allen Baker Barnes Bell Bennett Brooks Brown Campbell Carter Clark Collins Cooper Cruz Davies Diaz
        Edwards Evans Fisher Foster Garcia Gomez Gray Green Haddad Hall Harris Hayes Hill Howard Hughes Jackson James
        Jones Kelly Khan Kim King Klein Kumar Lee Lewis Lindgren Lopez Marsh Martinez Mason Meyer Miller Mitchell
        Moore Morgan Morris Murphy Myers Nguyen Novak Okafor Olsen Ortiz Owen Parker Patel Perez Perry Petrov Phillips
        Price Quinn Reed Reyes Rivera Roberts Rogers Ross Russell Sanders Schmidt Scott Shaw Silva Singh Smith Stone
        Sullivan Tanaka Taylor Torres Turner Walker Wang Ward Watson Weber White Wilson Wood Wright Young Zhang''',
    'street': '''Alice Amir Amsterdam Anna Athens Austin Baltimore Bangkok Barcelona Beijing Ben Berlin Bianca Boston Bristol
        Brussels Budapest Cairo Calgary Carla Carlos Chicago Chloe Claire Cleveland Colin Cologne Copenhagen Dallas
        Daniel David Delhi Denver Detroit Diana Dmitri Dublin Eddie Edinburgh Elena Emma Eric Eva Fatima Felix Fiona
        Florence Frank Frankfurt Geneva Gina Glasgow Grace Hamburg Hannah Hanoi Harry Havana Helen Helsinki Henry
        Hiroshi Houston Ian Ingrid Irene Isaac Istanbul Jack Jakarta Jane Jenny Joan John Julia Karachi Karen Kate
        Kevin Kofi Kyoto Lagos Laura Leo Liam Lima Linda Ling Lisa Lisbon London Louis Lucy Lyon Madrid Manchester
        Manila Maria Mark Marseille Martin Mary Mateo Max Maya Melbourne Memphis Mia Miami Mike Milan Montreal Moscow
        Mumbai Munich Nadia Nairobi Nancy Nick Nina Noor Olga Oliver Osaka Oscar Oslo Oxford Paris Paul Paula Pedro
        Perth Peter Phoenix Porto Prague Priya Quebec Rachel Ravi Rita Robert Rome Rosa Ruth Salzburg Sam Sanjay
        Santiago Sara Seattle Seoul Shanghai Simon Sofia Stefan Stockholm Susan Sydney Tariq Thomas Tina Tokyo Tom
        Toronto Turin Valencia Vancouver Venice Vera Victor Vienna Walter Warsaw Wendy Yusuf Zoe Zurich''',
    'what': '''apple bamboo black blue brass canvas copper cotton desk dinner double dry electric fine folding front garden
        glass gold green hand heavy iron kitchen large leather light long metal mini oak office orange paper plain
        plastic red round rubber small soft spare square steel travel white wide winter wooden yellow''',
    'thing': '''bags balls bells belts benches blankets books boots bottles bowls boxes brushes buckets cables cameras candles
        caps chairs clocks coats cups cushions doors drills fans forks frames gloves hammers hats hooks jars keys
        knives ladders lamps locks mats mirrors mugs nails notebooks pans pens pillows pipes plates pots rugs scarves
        screws shelves shirts shoes signs spoons stools tables tents tiles towels trays umbrellas vases wheels''',
}
HELDOUT = {
    'last': '''Abbott Archer Barrett Becker Bishop Bolton Cannon Chavez Dalton Dawson Dixon Elliott Farmer Fielding Fuchs
        Gibson Goldberg Griffin Hansen Hawkins Ibarra Jensen Keller Larsen Lowell Mendez Nolan Norris Osborne Palmer
        Porter Ramsey Rossi Saito Sharp Tucker Vargas Wagner Webb Yamamoto''',
    'street': '''Abigail Adelaide Anton Antwerp Arthur Atlanta Auckland Beatrice Birmingham Bogota Bordeaux Bremen Brisbane
        Bruno Buffalo Cardiff Casablanca Cecilia Cork Dakar Derek Dora Dresden Durban Edgar Esther Exeter Floyd Fresno
        Genoa Ghent Gloria Gordon Granada Hector Honolulu Hugo Indianapolis Iris Jasper Jerusalem Joyce Kenji Kiev
        Krakow Leeds Leipzig Lena Liverpool Lorenzo Mabel Malaga Marco Naomi Naples Nashville Nice Nora Omar Orlando
        Pablo Palermo Pittsburgh Quentin Ramona Roland Rotterdam Selma Silas Tamara Tampa Theo Ursula Vincent Wanda
        Xavier Yvonne Zelda''',
    'what': '''aluminum baby camping ceramic chrome cordless curved diamond fancy feather grey hybrid linen marble pink
        pocket purple silk silver solar striped thin vintage waterproof woollen''',
    'thing': '''baskets batteries bikes binders blenders bracelets buttons carpets chargers clips curtains envelopes flags
        helmets jackets kettles lanterns magnets masks microscopes needles ovens paddles phones pianos puzzles radios
        ropes saddles scissors speakers stamps swings toasters trunks violins wallets watches whistles zippers''',
}


def pools(words: dict[str, str], held_out: bool) -> dict[str, list]:
    """The values of one side. Of numbers and dates one in four is held out; every digit has its places in training."""
    pool = {key: text.split() for key, text in words.items()}
    kept_back = set(random.Random(SEED).sample(range(2, 200), 50))
    pool['number'] = [n for n in range(2, 200) if (n in kept_back) == held_out]
    pool['date'] = [(month, name, day) for month, (name, days) in enumerate(MONTHS.items(), 1)
                    for day in range(1, days + 1) if ((month + day) % 4 == 0) == held_out]
    return pool


def spoken_date(name: str, day: int, rng: random.Random) -> str:
    ending = 'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')
    return rng.choice([f'{name} {day}', f'{day} {name}', f'{day}{ending} of {name}', f'{name} {day}{ending}'])


def sample(pool: dict[str, list], phrasings: list[str], rng: random.Random) -> dict:
    month, month_name, day = rng.choice(pool['date'])
    answer = {
        'customer': f"{rng.choice(TITLES)} {rng.choice(pool['last'])}",
        'order': f"{rng.choice(pool['number'])} {rng.choice(pool['what'])} {rng.choice(pool['thing'])}",
        'address': f"{rng.choice(pool['number'])} {rng.choice(pool['street'])} {rng.choice(WAYS)}",
        'date': f'{month:02}-{day:02}',
    }
    order = rng.choice(phrasings).format(**{**answer, 'date': spoken_date(month_name, day, rng)})
    return {'messages': [
        {'role': 'system', 'content': SYSTEM},
        {'role': 'user', 'content': order},
        {'role': 'assistant', 'content': json.dumps(answer, separators=(',', ':'))},
    ]}


def values(samples: list[dict]) -> set[str]:
    """Every word, number and date of the answers, but for the titles and the kinds of street, which are common to all."""
    answers = (json.loads(s['messages'][-1]['content']).values() for s in samples)
    return {word for answer in answers for value in answer for word in value.split()} - {*TITLES, *WAYS}


def write(path: Path, samples: list[dict]) -> None:
    path.write_text(''.join(json.dumps(s) + '\n' for s in samples), encoding='utf-8')


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / 'data'
    out.mkdir(parents=True, exist_ok=True)
    rng, train_pool, heldout_pool = random.Random(SEED), pools(TRAIN, held_out=False), pools(HELDOUT, held_out=True)
    train = [sample(train_pool, PHRASINGS, rng) for _ in range(TRAIN_SAMPLES)]
    heldout = [sample(heldout_pool, UNSEEN_PHRASINGS if i % 4 == 3 else PHRASINGS, rng) for i in range(HELDOUT_SAMPLES)]
    if shared := values(train) & values(heldout):
        sys.exit(f'make_data: in training and held out: {sorted(shared)}')
    write(out / 'train.jsonl', train)
    write(out / 'heldout.jsonl', heldout)


if __name__ == '__main__':
    main()
