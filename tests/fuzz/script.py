def script(c): return ""
