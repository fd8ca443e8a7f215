"""Prompts and conversations, answered in the terminal or in a file.

options.py        what the command line says about sampling
generate.py       a prompt continued, or several
generate_file.py  a file of them: prompt_files.py reads it, answer_files.py keeps the answers
chat.py           a conversation: conversation.py holds it, commands.py has what a slash begins
terminal.py       where a person types and reads
"""
