"""Converters on the files of public data sets as they are published: small made-up ones in those layouts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gpl.evaluation import neutral
from gpl.evaluation.dataset import DataError, Dataset
from gpl.evaluation.sources import CONVERTERS
from streams.cli import app


def write(directory: Path, files: dict[str, str | bytes]) -> Path:
    """Files by path, gzipped where it ends in .gz; text as UTF-8."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return directory


def positives(dataset: Dataset) -> set[tuple[str, str]]:
    truth = dataset.truth
    assert truth is not None
    pairs = zip(truth.user.tolist(), truth.item.tolist(), truth.relevance.tolist(), strict=True)
    return {(dataset.users[user], dataset.items[item].item_id) for user, item, relevance in pairs if relevance > 0}


def taken(dataset: Dataset) -> dict[str, list[list[str]]]:
    """Each user's items by session, in order."""
    events = dataset.events
    assert events is not None
    found: dict[str, dict[int, list[str]]] = {}
    for user, item, session in zip(events.user.tolist(), events.item.tolist(), events.session.tolist(), strict=True):
        of_user = found.setdefault(dataset.users[user], {})
        of_user.setdefault(session, []).append(dataset.items[item].item_id)
    return {user: list(sessions.values()) for user, sessions in found.items()}


MATRIX = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
CAPTIONS = (
    "video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,"
    "second_level_category_id,second_level_category_name,third_level_category_id,third_level_category_name\n"
)
NAMES = "8.0,pets,673.0,cats,-124.0,UNKNOWN\n"


def watched(*cells: tuple[int, int, float]) -> str:
    return MATRIX + "".join(f"{u},{v},4381,6067,2020-07-05 05:27:48.378,20200705,1593,{r}\n" for u, v, r in cells)


def kuairec(captions: str = "") -> dict[str, str | bytes]:
    return {
        "small_matrix.csv": watched((14, 148, 0.7), (14, 183, 2.0), (19, 148, 3.5), (19, 7, 0.0), (20, 7, 0.1)),
        "big_matrix.csv": watched((0, 148, 2.5), (1, 148, 9), (0, 183, 1.9), (14, 183, 4), (0, 99, 4)),
        "kuairec_caption_category.csv": CAPTIONS + captions,
        "item_categories.csv": 'video_id,feat\n148,"[27, 9]"\n',
    }


@pytest.mark.parametrize("folder", ["", "data/"])
def test_kuairec_cells_below_a_watch_ratio_of_two_are_irrelevant(folder: str, tmp_path: Path) -> None:
    files = kuairec(f'148,UNKNOWN,a cat,"[cats,fun]",{NAMES}').items()
    dataset = CONVERTERS["kuairec"](write(tmp_path, {folder + name: content for name, content in files}))
    assert dataset.users == ["14", "19", "20"] and [item.item_id for item in dataset.items] == ["148", "183", "7"]
    assert positives(dataset) == {("14", "183"), ("19", "148")}
    assert dataset.truth is not None and dataset.truth.every_cell
    # What a user of the truth watched of 183 is no popularity.
    assert dataset.popularity is not None and dataset.popularity.tolist() == [2.0, 0.0, 0.0]
    assert [item.text for item in dataset.items] == ["a cat. cats,fun. pets. cats", "", ""]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("148,UNKNOWN,on\n\ntwo lines,[],", "on two lines. pets. cats"),
        ("148,UNKNOWN,a return\rwithin,[fun],", "a return within. fun. pets. cats"),
        ('148,UNKNOWN,"on\ntwo lines",[],', "on two lines. pets. cats"),
        ('148,UNKNOWN,"one quote,[fun],', "one quote. fun. pets. cats"),
        ('148,UNKNOWN,"one quote, a comma,"[fun,cats]",', "one quote, a comma. fun,cats. pets. cats"),
        ("148,UNKNOWN,a comma, and one,[fun],", "a comma, and one. fun. pets. cats"),
        ('148,UNKNOWN,"said ""miaow"", twice",[fun],', 'said "miaow", twice. fun. pets. cats'),
    ],
)
def test_kuairec_odd_captions_do_not_cost_the_next_row(row: str, text: str, tmp_path: Path) -> None:
    captions = f"{row}{NAMES}183,UNKNOWN,a dog,[],{NAMES}"
    dataset = CONVERTERS["kuairec"](write(tmp_path, kuairec(captions)))
    assert [item.text for item in dataset.items] == [text, "a dog. pets. cats", ""]


def test_kuairec_a_row_that_cannot_be_told_apart_has_no_content(tmp_path: Path) -> None:
    captions = f"148,UNKNOWN,cut\n183,UNKNOWN,a dog,[],{NAMES}"
    dataset = CONVERTERS["kuairec"](write(tmp_path, kuairec(captions)))
    assert [item.text for item in dataset.items] == ["", "a dog. pets. cats", ""]


PAGE = '<HTML>\n<BODY BGCOLOR="#fddf84">\n<!--begin of joke -->\n{}\n<!--end of joke -->\n</BODY>\n'


def jester(folder: str = "jokes/") -> dict[str, str | bytes]:
    return {
        "jester-data-1.csv": "2,7.5,-3.25\n1,9,99\n2,5,9.5\n",
        "jester-data-2.csv.gz": "2,-7,-8\n,,\n",
        f"{folder}init1.html": PAGE.format("Q. Who?<P>\nA. Tom &amp; I <i>did</i>."),
        f"{folder}init2.html": PAGE.format("A caf\xe9").encode("latin-1"),
    }


@pytest.mark.parametrize("folder", ["", "jokes/"])
def test_jester_matrices_and_pages(folder: str, tmp_path: Path) -> None:
    dataset = CONVERTERS["jester"](write(tmp_path, jester(folder)))
    assert [item.text for item in dataset.items] == ["Q. Who? A. Tom & I did .", "A café"]
    assert dataset.users == ["u1", "u3", "u4"]
    assert positives(dataset) == {("u1", "j1"), ("u3", "j1"), ("u3", "j2")}
    neutral.save(dataset, tmp_path / "out", "test")
    assert neutral.load(tmp_path / "out").users == dataset.users  # u4, to whom nothing is relevant, among them


def test_jester_jokes_may_be_a_table(tmp_path: Path) -> None:
    files = {name: content for name, content in jester().items() if name.startswith("jester")}
    dataset = CONVERTERS["jester"](write(tmp_path, {**files, "jokes.csv": "joke,text\na,One\nb,Two\n"}))
    assert positives(dataset) == {("u1", "a"), ("u3", "a"), ("u3", "b")}


def test_coat_as_unpacked(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "train.ascii": "5 0 1 4\n0 4 0 0\n",
        "test.ascii.gz": "0 5 0 0\n4 0 2 0\n",
        "user_item_features/item_features.ascii": "1 0 1\n0 1 0\n1 0 0\n0 1 1\n",
        "user_item_features/item_features_map.txt": "gender:men\ngender:women\njackettype:pea",
    }
    dataset = CONVERTERS["coat"](write(tmp_path, files))
    # The random exposure is the truth, and no rating of one's own is held out.
    assert positives(dataset) == {("u0", "c1"), ("u1", "c0")}
    assert dataset.log is not None and dataset.log.exposed.sizes.tolist() == [3, 1]


def objects(*records: dict[str, object], literal: bool = False) -> str:
    return "".join((repr(record) if literal else json.dumps(record)) + "\n" for record in records)


def review(user: str, item: str, time: int, year: int = 2018) -> dict[str, object]:
    if year < 2023:
        return {"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": time, "reviewText": "Ok"}
    return {"user_id": user, "asin": f"{item}-red", "parent_asin": item, "rating": 1.0, "timestamp": 1000 * time}


def test_amazon_2014_and_its_python_literals(tmp_path: Path) -> None:
    products = (
        {"asin": "B1", "title": "Owner's Ink", "brand": "HP", "description": "Owner's Ink. <b>Black</b> &amp; blue."},
        {"asin": "B2", "price": 5.99, "related": {"also_bought": ["B1"]}},
        {"asin": "B3", "title": "Never reviewed"},
    )
    reviews = [review("A", "B2", 200), review("A", "B1", 100), review("A", "gone", 1), review("C", "B1", 50)]
    files: dict[str, str | bytes] = {
        "meta_Office_Products.json.gz": objects(*products, literal=True),
        "reviews_Office_Products_5.json.gz": objects(*reviews),
        "reviews_Office_Products.json.gz": objects(review("D", "B1", 1)),
    }
    dataset = CONVERTERS["amazon-office"](write(tmp_path, files))
    assert dataset.name == "amazon-office" and taken(dataset) == {"A": [["B1"], ["B2"]], "C": [["B1"]]}
    assert {item.item_id: item.text for item in dataset.items} == {"B1": "HP Owner's Ink. Black & blue.", "B2": ""}


def test_amazon_2018_reviews_of_one_day_are_one_session(tmp_path: Path) -> None:
    products = (
        {"asin": "B1", "title": "Ink", "description": ["Black.", "For printers."], "brand": "HP"},
        {"asin": "B1", "title": "The same again"},
        {"asin": "B2", "title": "var aPageStart = (new Date()).getTime();", "description": [], "brand": "\n  BIC\n"},
    )
    reviews = [review("A", "B2", 86400), review("A", "B1", 86400), review("A", "B2", 0)]
    files: dict[str, str | bytes] = {
        "meta_Office_Products.json.gz": objects(*products),
        "Office_Products_5.json.gz": objects(*reviews),
    }
    dataset = CONVERTERS["amazon"](write(tmp_path, files))
    assert taken(dataset) == {"A": [["B2"], ["B2", "B1"]]}
    assert [item.text for item in dataset.items] == ["BIC", "HP Ink. Black. For printers."]


@pytest.mark.parametrize("table", [False, True])
def test_amazon_2023_of_any_category(table: bool, tmp_path: Path) -> None:
    reviews = [review("A", "B2", 2, 2023), review("A", "B1", 1, 2023)]
    csv = "user_id,parent_asin,rating,timestamp\n" + "".join(
        f"{row['user_id']},{row['parent_asin']},{row['rating']},{row['timestamp']}\n" for row in reviews
    )
    files: dict[str, str | bytes] = {
        "meta_Video_Games.jsonl.gz": objects(
            {"parent_asin": "B1", "title": "Chess", "store": "Acme", "description": []},
            {"parent_asin": "B2", "title": "Go", "store": None, "description": ["Black and white"]},
        ),
        **({"Video_Games.csv.gz": csv} if table else {"Video_Games.jsonl.gz": objects(*reviews)}),
    }
    dataset = CONVERTERS["amazon"](write(tmp_path, files))
    assert dataset.name == "amazon-video-games" and taken(dataset) == {"A": [["B1"], ["B2"]]}
    assert [item.text for item in dataset.items] == ["Go. Black and white", "Acme Chess"]


RETAIL = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"


def invoice(number: str, code: str, date: str, quantity: int = 6, user: str = "17850", name: str = "LANTERN") -> str:
    return f"{number},{code},{name},{quantity},{date},2.55,{user},United Kingdom\n"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("9/28/2010 8:26", "12/1/2010 8:26"),
        ("9/28/10 8:26", "12/1/10 8:26"),
        ("28/09/2010 08:26", "01/12/2010 08:26"),
        ("28-09-2010 08:26", "01-12-2010 08:26"),
        ("2010-09-28 08:26:00", "2010-12-01 08:26:00"),
    ],
)
def test_retail_orders_by_the_invoice_date(earlier: str, later: str, tmp_path: Path) -> None:
    rows = invoice("2", "71053", later) + invoice("1", "85123A", earlier) + invoice("1", "22752", earlier)
    dataset = CONVERTERS["online-retail"](write(tmp_path, {"Online Retail.csv": RETAIL + rows}))
    assert taken(dataset) == {"17850": [["85123A", "22752"], ["71053"]]}


def test_retail_leaves_out_what_is_no_purchase_of_a_product(tmp_path: Path) -> None:
    date = "2010-12-01 08:26:00"
    rows = (
        invoice("536365", "85123a", date, user="17850.0", name="ROSA\xa3 MUG")
        + invoice("536365", "85123A", date, name="wrongly marked")
        + invoice("536366", "85123A", date, user="9", name="ROSA\xa3 MUG ")
        + invoice("C536367", "22752", date, -1)
        + invoice("536368", "22752", date, -1)
        + invoice("536369", "22752", date, 0)
        + invoice("536370", "22752", date, user="")
        + invoice("536371", "POST", date)
    )
    header = RETAIL.replace("InvoiceNo", "Invoice").replace("CustomerID", "Customer ID").replace("UnitPrice", "Price")
    files: dict[str, str | bytes] = {"online_retail_II.csv.gz": (header + rows).encode("latin-1")}
    dataset = CONVERTERS["online-retail"](write(tmp_path, files))
    assert taken(dataset) == {"17850": [["85123A", "85123A"]], "9": [["85123A"]]}
    assert [item.text for item in dataset.items] == ["ROSA£ MUG"]


COAT = {"item_features.ascii": "1\n1\n1\n", "item_features_map.txt": "gender:men\n"}
SMALL = {
    "small_items.csv": "video_id\n5\n",
    "small_users.csv": "user_id\n1\n",
    "small_positives.csv": "user_id,video_id\n1,5\n",
    "big_positives_train.csv": "user_id,video_id\n",
    "videos.csv": "video_id,caption,topic_tag\n",
}
OFFICE = {"items.csv": "item,title,description,brand\n0,Ink,,HP\n"}
SHOP = {"items.csv": "item,title\n10,GLOBE\n"}
JOKES = {"jokes.csv": "joke,text\nj1,One\n"}
META = {"meta_Office_Products.json": objects({"asin": "B1", "title": "Ink"})}


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("kuairec", {**SMALL, "small_items.csv": "video_id\n5\n5\n"}, "small_items.csv: video_id '5' stands twice"),
        ("kuairec", {**SMALL, "small_users.csv": "user_id\n1\n1\n"}, "small_users.csv: user_id '1' stands twice"),
        ("kuairec", {**SMALL, "small_positives.csv": "user_id,video_id\n2,5\n"}, "small_positives.csv: no watch ratio"),
        ("kuairec", {**kuairec(), "small_matrix.csv": watched((1, 2, 0.5))}, "small_matrix.csv: no watch ratio"),
        ("kuairec", {**kuairec(), "small_matrix.csv": watched((1, 2, np.nan))}, "watch_ratio 'nan', expected a number"),
        ("kuairec", {**kuairec(), "kuairec_caption_category.csv": "video_id\n"}, "column 'caption' is missing"),
        ("jester", {**JOKES, "ratings.csv": "user,joke,rating\nu1,j1,99\n"}, "no user rated all 1 jokes"),
        ("jester", {**JOKES, "ratings.csv": "user,joke,rating\nu1,j1,nan\n"}, "rating 'nan', expected a number"),
        ("jester", {**JOKES, "ratings.csv": "user,joke,rating\nu1,j1,11\n"}, "rating '11', expected -10 to 10"),
        ("jester", {**JOKES, "ratings.csv": "user,joke,rating\nu1,j1,4\n"}, "ratings.csv: no rating of at least 5"),
        ("jester", {**JOKES, "jester-data-1.csv": "1,5\n5\n"}, "jester-data-1.csv:2: 1 columns, expected 2"),
        ("jester", {**JOKES, "jester-data-1.xls": b"\xd0\xcf"}, "jester-data-1.xls: workbooks are not read; save it"),
        (
            "jester",
            {**JOKES, "jester-data-1.csv": "1,5\n", "jester-data-2.xls": b"\xd0\xcf"},
            "jester-data-2.xls: workbooks are not read",
        ),
        ("jester", {"init1.html": "<p>A joke", "jester-data-1.csv": "1,5\n"}, "init1.html: no joke between"),
        ("coat", {**COAT, "train.ascii": "5 0 6\n"}, "train.ascii: rating 6, expected 1 to 5"),
        ("coat", {**COAT, "train.ascii": "5 0 -1\n"}, "train.ascii: rating -1, expected 1 to 5"),
        ("coat", {**COAT, "train.ascii": "0 0 0\n"}, "train.ascii: no ratings"),
        ("coat", {**COAT, "train.ascii": ""}, "train.ascii: no ratings"),
        ("coat", {**COAT, "train.ascii": "1 2 3\n"}, "train.ascii: no rating to judge on is at least 4"),
        ("coat", {**COAT, "train.ascii": "5 0 0\n", "test.ascii": "5 1 1\n"}, "test.ascii: no rating to judge on"),
        (
            "coat",
            {**COAT, "train.ascii": "5 5 5\n", "item_features_map.txt": "gender:m\xe4n\n".encode("latin-1")},
            "item_features_map.txt: not UTF-8",
        ),
        (
            "mind",
            {"news.tsv": "", "behaviors.tsv": "1\tU1\t11/10/2019 2:14:46 PM\t\tN1-0\n"},
            "behaviors.tsv: no click of the half",
        ),
        (
            "amazon-office",
            {**OFFICE, "events.csv": "user,item,order,split\nA,0,0,undated\n"},
            "events.csv: no event of a known item",
        ),
        ("amazon-office", {**OFFICE, "events.csv": "user,item,order,split\nA,0,inf,train\n"}, "order 'inf', expected"),
        (
            "amazon-office",
            {**OFFICE, "events.csv": b"user,item,order,split\n\xe9,0,1,train\n"},
            "events.csv: not UTF-8",
        ),
        ("amazon", {**META, "Office_Products.json": objects(review("A", "B2", 1))}, "no review of a product of meta_"),
        ("amazon", {**META, "Office_Products.json": "{'asin'\n"}, "Office_Products.json:1: neither a JSON object"),
        (
            "amazon",
            {**META, "Office_Products.json": '{"asin": "B1"}\n'},
            "Office_Products.json: time None, expected a number",
        ),
        ("amazon", {**META, "meta_Books.jsonl": ""}, "metadata of Books and Office_Products, expected of one"),
        (
            "online-retail",
            {**SHOP, "events.csv": "user,item,timestamp,basket,qty\n7,10,1,C2,1\n7,10,1,3,0\n7,10,1,4,-2\n"},
            "events.csv: no purchase of a known item",
        ),
        ("online-retail", {"Online Retail.csv": RETAIL}, "Online Retail.csv: no purchase of a known item"),
        (
            "online-retail",
            {"Online Retail.csv": RETAIL + invoice("1", "71053", "9/28/2010 8:26") + invoice("2", "71053", "soon")},
            "InvoiceDate 'soon', expected all as",
        ),
        ("online-retail", {"Online Retail.xlsx": b"PK"}, "Online Retail.xlsx: workbooks are not read; save it"),
        ("online-retail", {**SHOP, "events.csv.gz": b""}, "events.csv.gz: column 'user' is missing"),
    ],
)
def test_what_cannot_be_used_is_one_message_and_nothing_is_written(
    name: str, files: dict[str, str | bytes], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", files)
    with pytest.raises(DataError) as error:
        CONVERTERS[name](source)
    assert message in str(error.value)
    result = CliRunner().invoke(app, ["datasets", "convert", name, str(source), str(tmp_path / "out")])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("events.csv.gz", {**SHOP, "events.csv.gz": "user,item,timestamp,basket\n" + "7,10,1,2\n" * 99}),
        ("Online Retail.csv.gz", {"Online Retail.csv.gz": RETAIL + invoice("1", "71053", "9/28/2010 8:26") * 99}),
    ],
)
def test_a_file_that_is_cut_off_is_named(name: str, files: dict[str, str | bytes], tmp_path: Path) -> None:
    write(tmp_path, files)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        CONVERTERS["online-retail"](tmp_path)


def test_rearranged_files_come_first(tmp_path: Path) -> None:
    write(tmp_path, {**kuairec(), **SMALL})
    assert CONVERTERS["kuairec"](tmp_path).users == ["1"]
