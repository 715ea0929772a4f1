"""What a file of human judgments would teach a reward model beside quality. NumPy, SciPy and Arrow; no torch.

`gather` reads the file once into compact tables; each further module answers one question from them; `findings` says
in words what the answers mean; `audit` does all of it.
"""
