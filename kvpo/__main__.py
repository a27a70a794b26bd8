from kvpo.cli import program

program()
