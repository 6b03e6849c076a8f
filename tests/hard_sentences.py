"""Sentences that are hard to part, written for this test, and paragraphs of books in the public
domain. Each entry is one text, parted where a reader would part it.
"""

HARD: list[list[str]] = [
    ["Mr. Brown met Mrs. Green at noon.", "They had tea with Dr. White."],
    ["Prof. Lee and Ms. Jones wrote it.", "Capt. Ahab did not."],
    ["She joined the U.S. Army in 1943.", "He stayed at home."],
    ["The U.S. is large.", "The U.K. is not."],
    ["He moved to the U.S. in May.", "It rained."],
    ["They live in the U.S.", "We live elsewhere."],
    ["J. R. R. Tolkien wrote it.", "C. S. Lewis read it."],
    ["George W. Bush spoke first.", "John F. Kennedy had spoken before."],
    ["See Fig. 2 for the curve.", "Fig. 3 shows the rest."],
    ["The rate is given in Eq. 4 and Sec. 5.", "Table 1 lists all."],
    ["As No. 7 of the series it sold well.", "No. 8 did not."],
    ["Smith et al. found the same.", "Others disagreed."],
    ["Jones et al. (2014) repeated it.", "Nothing changed."],
    ["Bring fruit, e.g. apples, pears, etc. for the trip.", "Leave the rest."],
    ["The latter, i.e. the third, won.", "Nobody cheered."],
    ["We bought pens, paper, etc.", "Then we left."],
    ["He arrived at 5 p.m. and left at once.", "She came at 6 a.m. the next day."],
    ["The shop opens at 9 a.m.", "It closes at noon."],
    ["It costs $3.50 at most.", "The other is 2.5 times as much."],
    ["Version 2.0.1 is out.", "Version 3.0 is not."],
    ["Pi is about 3.14159.", "It never ends."],
    ["Visit example.com for more.", "Or write to a.b@example.org today."],
    ["Open README.md first.", "Then run setup.py twice."],
    ['"Why?" he asked.', '"Because," she said, "I must."'],
    ['"Stop!" cried the guard.', "Nobody stopped."],
    ['He said, "I am here."', "She did not answer."],
    ['She whispered, "Is it over?"', "It was not."],
    ['"It is late," he said.', '"Go home."'],
    ['"I came.', "I saw.", 'I won," he said.'],
    ['"Where is it?', "Who has it?", 'Give it back!"', "She had it."],
    ["He wrote: 'It is cold.", "It will snow.'", "It did not."],
    ["\u201cI know.", "You need not say it.\u201d", "He said it."],
    ["\u201cCome in.\u201d", "The door opened."],
    ["\u201cAre you well?\u201d she asked.", "He nodded."],
    ["It ended (as we know) badly.", "(Nobody knew why.)", "We went on."],
    ["He wrote two books (the second in 1901.)", "Both were lost."],
    ["Wait...", "What was that?"],
    ["I thought... well, never mind.", "Let us go."],
    ["Really?!", "You must be joking!"],
    ["Go!", "Go now!", "Do not look back."],
    ["Who came?", "Anna.", "And who left?", "Nobody."],
    ["St. Paul's is in London.", "St. Peter's is in Rome."],
    ["He lives at 12 Elm St. in Boston.", "She lives at 5 Oak Ave. nearby."],
    ["Mt. Everest is the highest.", "K2 comes second."],
    ["Acme Inc. bought Widget Co. last year.", "The price was high."],
    ["He works for Acme Inc.", "She works for the state."],
    ["Apple Inc. was founded in 1976.", "Microsoft Corp. is a year older."],
    ["Martin Luther King Jr. spoke in 1963.", "Many listened."],
    ["The work is by John Smith, Ph.D., of Leeds.", "It is short."],
    ["She holds a Ph.D. in physics.", "He holds an M.A. in history."],
    ["The meeting is on Jan. 5 or Feb. 6.", "Dec. 24 is a holiday."],
    ["On Sept. 11 it was cold.", "On Oct. 3 it snowed."],
    ["Gen. Lee met Lt. Col. Harris and Sgt. York.", "Gov. Brown was away."],
    ["Sen. Warren and Rep. Smith disagreed.", "The vote was close."],
    ["Rev. Gray read vol. 2, pp. 10-12.", "He liked ch. 4 best."],
    ["In Brown v. Board the court agreed.", "The law changed."],
    ["It was, approx. 5 km long.", "Nobody measured it again."],
    ["The temperature fell to -5.", "5 people froze."],
    ["In 1999 he left.", "1,000 people came in 2000."],
    ["iPhones sold well.", "eBay did not."],
    ["Yahoo! was founded in 1994.", "It grew fast."],
    ["The E.U. and the U.N. met in Washington, D.C. on Monday.", "Nothing was decided."],
    ["Plan A failed.", "Plan B. worked by chance."],
    ["Is this plan B?", "Yes."],
    ["It was I.", "She knew it was I."],
    ["He got an A.", "She got a B."],
    ["Vitamin C.", "Vitamin D."],
    ["a. Open the box.", "b. Take out the parts."],
    ["The ratio of A vs. B is known.", "That of B vs. C is not."],
    ["He was born c. 1350 and d. 1400.", "Little else is known."],
    ["he met mr. brown of the u.s. army.", "then he left.", "was it late?", "it was."],
    ["the cat sees the sea.", "a dog wants a house."],
]
PARAGRAPHS: list[list[str]] = [
    [  # Abraham Lincoln, 1863
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
        "conceived in Liberty, and dedicated to the proposition that all men are created equal.",
        "Now we are engaged in a great civil war, testing whether that nation, or any nation so "
        "conceived and so dedicated, can long endure.",
        "We are met on a great battle-field of that war.",
        "We have come to dedicate a portion of that field, as a final resting place for those who "
        "here gave their lives that that nation might live.",
        "It is altogether fitting and proper that we should do this.",
    ],
    [  # Jane Austen, Pride and Prejudice, 1813
        '"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park '
        'is let at last?"',
        "Mr. Bennet replied that he had not.",
        '"But it is," returned she; "for Mrs. Long has just been here, and she told me all about '
        'it."',
        "Mr. Bennet made no answer.",
        '"Do you not want to know who has taken it?" cried his wife, impatiently.',
        '"You want to tell me, and I have no objection to hearing it."',
        "This was invitation enough.",
    ],
    [  # Herman Melville, Moby-Dick, 1851
        "Call me Ishmael.",
        "Some years ago\u2014never mind how long precisely\u2014having little or no money in my "
        "purse, and nothing particular to interest me on shore, I thought I would sail about a "
        "little and see the watery part of the world.",
        "It is a way I have of driving off the spleen and regulating the circulation.",
        "There is nothing surprising in this.",
        "If they but knew it, almost all men in their degree, some time or other, cherish very "
        "nearly the same feelings towards the ocean with me.",
    ],
    [  # Lewis Carroll, Alice's Adventures in Wonderland, 1865
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
        "nothing to do: once or twice she had peeped into the book her sister was reading, but it "
        "had no pictures or conversations in it, \u201cand what is the use of a book,\u201d "
        "thought Alice \u201cwithout pictures or conversations?\u201d",
        "So she was considering in her own mind (as well as she could, for the hot day made her "
        "feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth "
        "the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink "
        "eyes ran close by her.",
    ],
    [  # Arthur Conan Doyle, A Scandal in Bohemia, 1891
        "To Sherlock Holmes she is always the woman.",
        "I have seldom heard him mention her under any other name.",
        "In his eyes she eclipses and predominates the whole of her sex.",
        "It was not that he felt any emotion akin to love for Irene Adler.",
        "\u201cWedlock suits you,\u201d he remarked.",
        "\u201cI think, Watson, that you have put on seven and a half pounds since I saw "
        "you.\u201d",
        "\u201cSeven!\u201d I answered.",
        "\u201cIndeed, I should have thought a little more.\u201d",
    ],
    [  # Charles Dickens, A Christmas Carol, 1843
        "Marley was dead: to begin with.",
        "There is no doubt whatever about that.",
        "The register of his burial was signed by the clergyman, the clerk, the undertaker, and "
        "the chief mourner.",
        "Scrooge signed it: and Scrooge\u2019s name was good upon \u2019Change, for anything he "
        "chose to put his hand to.",
        "Old Marley was as dead as a door-nail.",
        "Mind!",
        "I don\u2019t mean to say that I know, of my own knowledge, what there is particularly "
        "dead about a door-nail.",
    ],
    [  # Charles Darwin, On the Origin of Species, 1859
        "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the "
        "distribution of the inhabitants of South America.",
        "These facts seemed to me to throw some light on the origin of species\u2014that mystery "
        "of mysteries, as it has been called by one of our greatest philosophers.",
        "My work is now nearly finished; but as it will take me two or three more years to "
        "complete it, and as my health is far from strong, I have been urged to publish this "
        "Abstract.",
        "I have more especially been induced to do this, as Mr. Wallace, who is now studying the "
        "natural history of the Malay archipelago, has arrived at almost exactly the same general "
        "conclusions that I have on the origin of species.",
    ],
]
