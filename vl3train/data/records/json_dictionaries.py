"""JSON files that are one object and no list: captions of COCO, questions and answers of VQA, lists under a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vl3train.contracts.records import SampleError

LIST_KEYS = ("data", "records", "annotations", "questions", "examples", "samples")
"""Under one of them an object may hold its records; the first that is a list counts."""

Placed = tuple[str, Any | SampleError]
"""A record, and where in the file it stands: ``[annotations][3]``."""


def dictionary_records(
    whole: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any]]]
) -> Iterator[Placed]:
    """The records of a JSON object; of questions, the answers are looked up in ``others``, objects of other files.

    >>> coco = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "A cat."}]}
    >>> list(dictionary_records(coco, []))
    [('[annotations][0]', {'image': '7.jpg', 'caption': 'A cat.'})]
    """
    annotations, questions = _list(whole, "annotations"), _list(whole, "questions")
    if questions and any("question" in one for one in questions):
        yield from _answered(whole, questions, [whole, *(other for _, other in others)])
    elif annotations and "question_id" in annotations[0] and "question" not in annotations[0]:
        if not any(_list(other, "questions") for _, other in others):
            yield (
                "",
                SampleError(
                    "answers to questions of another file; name both: vl3train shards QUESTIONS.json ANSWERS.json"
                ),
            )
    elif annotations and _list(whole, "images"):
        yield from _captions(_list(whole, "images"), annotations)
    elif key := next((key for key in LIST_KEYS if isinstance(whole.get(key), list)), None):
        yield from ((f"[{key}][{number}]", record) for number, record in enumerate(whole[key]))
    elif whole and all(isinstance(record, Mapping) for record in whole.values()):
        yield from ((f"[{name}]", record) for name, record in whole.items())
    else:
        yield (
            "",
            SampleError(
                "holds no list of records, but an object; a file with one record a line is called .jsonl"
            ),
        )


def _list(whole: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects under a key; none where something else is there."""
    found = whole.get(key)
    return (
        found if isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found) else []
    )


def _captions(images: list[Mapping[str, Any]], annotations: list[Mapping[str, Any]]) -> Iterator[Placed]:
    """Captions of COCO and others of its form, each with its picture's file."""
    names = {image.get("id"): image.get("file_name") for image in images}
    for number, annotation in enumerate(annotations):
        place = f"[annotations][{number}]"
        name = names.get(annotation.get("image_id"))
        if "caption" not in annotation:
            yield place, SampleError(f"an annotation without `caption`; it has {sorted(annotation)}")
        elif not name:
            yield place, SampleError(f"no file_name of image_id={annotation.get('image_id')!r} under images")
        else:
            yield place, {"image": name, "caption": annotation["caption"]}


def _answered(
    whole: Mapping[str, Any], questions: list[Mapping[str, Any]], sources: list[Mapping[str, Any]]
) -> Iterator[Placed]:
    """Questions of VQA and others of its form, each with its answer of the file of annotations."""
    answers: dict[Any, Mapping[str, Any]] = {}
    for source in sources:
        for annotation in _list(source, "annotations"):
            answers.setdefault(annotation.get("question_id"), annotation)
    for number, question in enumerate(questions):
        place = f"[questions][{number}]"
        answer = _answer({**answers.get(question.get("question_id"), {}), **question})
        image = _image(whole, question)
        if answer is None:
            yield (
                place,
                SampleError(
                    f"no answer to question_id={question.get('question_id')!r}; name the file of answers, too: "
                    "vl3train shards QUESTIONS.json ANSWERS.json"
                ),
            )
        elif image is None:
            yield (
                place,
                SampleError(f"no picture: none of image, file_name, image_id; it has {sorted(question)}"),
            )
        else:
            yield place, {"image": image, "question": question.get("question"), "answer": answer}


def _answer(annotation: Mapping[str, Any]) -> Any:
    """The answer that counts: VQA's ``multiple_choice_answer``, or the commonest of the people who answered."""
    for key in ("multiple_choice_answer", "answer"):
        if annotation.get(key) not in (None, ""):
            return annotation[key]
    said = annotation.get("answers")
    said = [one.get("answer") if isinstance(one, Mapping) else one for one in said] if said else []
    words = [str(one) for one in said if one not in (None, "")]
    return Counter(words).most_common(1)[0][0] if words else None


def _image(whole: Mapping[str, Any], question: Mapping[str, Any]) -> Any:
    """The picture's file; of VQA, which gives COCO's number, by the name that COCO's file has."""
    for key in ("image", "image_path", "file_name"):
        if question.get(key):
            return question[key]
    number, part = question.get("image_id"), whole.get("data_subtype")
    if isinstance(number, int) and part:
        return f"COCO_{str(part).replace('test-dev2015', 'test2015')}_{number:012d}.jpg"
    return f"{number:012d}.jpg" if isinstance(number, int) else number
