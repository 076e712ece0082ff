"""What the scripts train and study: data (`data`, `texts`), networks (`models`, `text_models`), jobs (`tasks`), and the zoo of models
(`zoo`, `zoo_misc`).
"""
