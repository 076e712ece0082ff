"""What the scripts train and study: data (`data`, `texts`), networks (`models`, `text_models`), jobs (`tasks`), the zoo of models
(`zoo`, `zoo_misc`), and the decision table (`jobs`, `rows`, `cells`, `verdicts`).
"""
