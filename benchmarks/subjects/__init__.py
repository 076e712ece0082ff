"""What the scripts train and study: data (`data`, `texts`), networks (`models`, `text_models`), jobs (`tasks`), the zoo of models
(`zoo`, `zoo_misc`), the decision table (`jobs`, `rows`, `cells`, `verdicts`), and the papers' comparison (`paper_rows`)
and their models with the ranks and figures that they print (`paper_models`).
"""
