from kvpo.commands.main import program

program()
