"""Small talk in seven languages from a small grammar: text without one correct answer.

A teacher can be uncertain about it.
"""

from __future__ import annotations

import random
import unicodedata

from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.tasks.task import TaskItem

# language -> the question; then what each place of a sentence may hold, all of it equally likely
TALK = {
    "en": (
        "Tell me something.",
        "Today |Tonight |Often |Sometimes |Now |Later |Mostly |Again |Still |Maybe ",
        "markets |rivers |streets |houses |rooms |towns |fields |shops |parks |roads ",
        "sleep|wake|shine|wait|change|grow|fade|hide|stay|rise",
        ", and |, but |; |, so |, while |, yet ",
        "cats |bakers |birds |children |friends |teachers |dogs |singers |guests |cooks ",
        "sing.|read.|laugh.|walk.|work.|rest.|listen.|dance.|eat.|play.",
    ),
    "zh": (
        "说点什么吧。",
        "今天|明天|晚上|早上|有时|常常|现在|后来|也许|仍然",
        "市场|河水|街道|房子|城市|田野|商店|公园|山上|海边",
        "很静|很亮|很冷|很大|很新|很旧|很远|很热|很美|很好",
        "，|，但|，所以|，而|；|，又",
        "猫|鸟|孩子|朋友|老师|客人|妹妹|医生|狗|大家",
        "唱歌。|看书。|笑了。|走路。|工作。|休息。|听着。|跳舞。|吃饭。|回家。",
    ),
    "ja": (
        "何か話して。",
        "今日は|明日は|夜は|朝は|時々|よく|今は|後で|多分|また",
        "市場が|川が|道が|家が|町が|畑が|店が|公園が|山が|海が",
        "静かで|明るく|寒く|大きく|新しく|古く|遠く|暑く|美しく|暗く",
        "、|、でも|、だから|、そして|、今|、また",
        "猫が|鳥が|子が|友が|先生が|客が|妹が|医者が|犬が|皆が",
        "歌う。|読む。|笑う。|歩く。|働く。|休む。|聞く。|踊る。|食べる。|帰る。",
    ),
    "ko": (
        "아무 말이나 해 봐요.",
        "오늘 |내일 |밤에 |아침에 |가끔 |자주 |지금 |나중에 |아마 |다시 ",
        "시장이 |강이 |길이 |집이 |도시가 |밭이 |가게가 |공원이 |산이 |바다가 ",
        "조용하고|밝고|춥고|크고|새롭고|낡고|멀고|덥고|예쁘고|어둡고",
        ", | |, 또 |, 늘 |, 곧 |, 더 ",
        "고양이가 |새가 |아이가 |친구가 |선생님이 |손님이 |동생이 |의사가 |개가 |모두 ",
        "노래해요.|읽어요.|웃어요.|걸어요.|일해요.|쉬어요.|들어요.|춤춰요.|먹어요.|가요.",
    ),
    "vi": (
        "Nói gì đó đi.",
        "Hôm nay |Ngày mai |Tối nay |Sáng nay |Đôi khi |Thường |Bây giờ |Sau đó |Có lẽ |Lại ",
        "chợ |sông |đường |nhà |phố |đồng |quán |vườn |núi |biển ",
        "yên|sáng|lạnh|lớn|mới|cũ|xa|nóng|đẹp|tối",
        ", và |, nhưng |, nên |, còn |; |, rồi ",
        "mèo |chim |trẻ em |bạn |cô giáo |khách |em |bác sĩ |chó |ai cũng ",
        "hát.|đọc.|cười.|đi bộ.|làm việc.|nghỉ.|nghe.|múa.|ăn.|về.",
    ),
    "id": (
        "Ceritakan sesuatu.",
        "Hari ini |Besok |Nanti |Tadi |Kadang |Sering |Kini |Lalu |Mungkin |Lagi ",
        "pasar |sungai |jalan |rumah |kota |sawah |toko |taman |gunung |laut ",
        "sepi|terang|dingin|besar|baru|tua|jauh|panas|indah|gelap",
        ", dan |, tetapi |, jadi |, lalu |; |, namun ",
        "kucing |burung |anak |teman |guru |tamu |adik |dokter |anjing |semua ",
        "bernyanyi.|membaca.|tertawa.|berjalan.|bekerja.|tidur.|mendengar.|menari.|makan.|pulang.",
    ),
    "th": (
        "เล่าอะไรหน่อย",
        "วันนี้|พรุ่งนี้|คืนนี้|เช้านี้|บางที|มัก|ตอนนี้|ต่อมา|อาจ|ยัง",
        "ตลาด|แม่น้ำ|ถนน|บ้าน|เมือง|นา|ร้าน|สวน|ภูเขา|ทะเล",
        "เงียบ|สว่าง|เย็น|ใหญ่|ใหม่|เก่า|ไกล|ร้อน|สวย|มืด",
        " และ| แต่| เลย| ส่วน| แล้ว| ",
        "แมว|นก|เด็ก|เพื่อน|ครู|แขก|น้อง|หมอ|หมา|ทุกคน",
        "ร้องเพลง|อ่าน|หัวเราะ|เดิน|ทำงาน|พัก|ฟัง|เต้นรำ|กิน|กลับ",
    ),
}


def small_talk(rng: random.Random, language: str = "") -> TaskItem:
    """Return one sentence of small talk and the question before it."""
    language = language or rng.choice(list(TALK))
    question, *places = TALK[language]
    sentence = unicodedata.normalize(
        "NFC", "".join(rng.choice(place.split("|")) for place in places)
    ).strip()
    return TaskItem(
        Prompt(
            f"prose/talk/{language}/{sentence}",
            Conversation.from_question(question),
            "prose",
            language,
        ),
        sentence,
    )
