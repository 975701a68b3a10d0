WORLDS = (2, 3, 4)
def law_table(w): return ""
